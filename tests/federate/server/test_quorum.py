"""Of the global update the LLM takes what enough clients hold."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import load_factors, parse_key
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server import protecting
from legolm.runs import RunDir, read_stages, rounds_of
from legolm.system import Progress


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    found = three_clients(tmp_path, ("dense", "wide", "half"), evaluate={"local_only": False})
    found["federation"] |= {"quorum": True}
    return found


@pytest.mark.parametrize("quorum", [0.5, 1.0])
def test_units_that_too_few_hold_stay_the_llms(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quorum: float
) -> None:
    """`dense` holds all, `wide` 64 of 96 neurons, `half` one layer and one KV group: counted here unit by unit."""
    monkeypatch.setattr(protecting, "QUORUMS", (quorum,) * 2)
    run, said = RunDir(tmp_path / "out"), StringIO()
    progress = Progress(Console(file=said, width=300))
    summary = pipeline.run(configs.validate(RunConfig, raw, "test"), run.path, progress=progress)
    assert f" with what {quorum:.0%} of the clients hold, blocks " in said.getvalue()
    scale = configs.validate(RunConfig, raw, "test").lora.scaling
    whole = load_file(run.round(summary.llm.best_round) / "adapter.safetensors")
    found = load_factors(run.final("llm"))[0]
    blocks = [read_block(run.block(name)).coverage for name in ("dense", "wide", "half")]
    gone = 0
    for key, tensor in whole.items():
        layer, module, side = parse_key(key)
        if side == "A":
            continue
        other = key.removesuffix("B") + "A"
        before, after = (scale * tensor) @ whole[other], found[key] @ found[other]
        held = torch.zeros_like(before)
        for coverage in blocks:
            if layer in coverage.layers:
                rows, cols = coverage.rows(layer, module), coverage.cols(layer, module)
                one = torch.zeros_like(before)
                one[slice(None) if rows is None else rows] += 1
                two = torch.zeros_like(before)
                two[:, slice(None) if cols is None else cols] += 1
                held += one * two
        kept = held >= quorum * 3
        torch.testing.assert_close(after, before * kept, rtol=1e-5, atol=1e-7)
        gone += int((~kept).sum())
    assert gone


def test_the_validation_loss_chooses(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says which, and with each of them alone the LLM's loss is no lower; blocks are as without."""
    losses = {}
    for name, tried in (("both", (0.0, 0.5, 1.0)), ("none", (0.0,)), ("half", (0.5, 0.5)), ("all", (1.0, 1.0))):
        monkeypatch.setattr(protecting, "QUORUMS", tried)
        run = RunDir(tmp_path / name)
        pipeline.run(configs.validate(RunConfig, raw, "test"), run.path, models=False)
        losses[name] = [
            (one.llm_validation, one.validation) for one in rounds_of(read_stages(run.path / "metrics.jsonl"))
        ]
        if name == "both":
            chosen = [one.quorum for one in rounds_of(read_stages(run.path / "metrics.jsonl"))]
    assert chosen[0] == 0.0 and len(chosen) == 3
    for number in range(3):
        each = {0.0: losses["none"][number][0], 0.5: losses["half"][number][0], 1.0: losses["all"][number][0]}
        assert losses["both"][number] == (min(each.values()), losses["none"][number][1])
        assert each[chosen[number]] == min(each.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate": {"scores": "own", "local_only": False}}, "evaluate.scores is own; set it to false"),
        ({"evaluate": {"local_only": True}, "mode": "alone"}, "learns nothing in mode alone; set it to false"),
    ],
)
def test_where_nothing_can_choose_it_is_refused(raw: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    if mode := changes.pop("mode", None):
        raw["federation"]["mode"] = mode
    with pytest.raises(LegolmError, match=f"federation.quorum .*{says}"):
        configs.validate(RunConfig, raw | changes, "test")
