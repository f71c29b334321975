"""Frozen factors that are made of text, and come with the blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import (
    FROZEN,
    Tensors,
    adapter_keys,
    adapter_layout,
    initial_factors,
    is_whitened,
    load_frozen,
    parse_key,
    save_frozen,
)
from legolm.block import read_block
from legolm.config import RunConfig, TextConfig
from legolm.data import calibration_tokens
from legolm.errors import LegolmError
from legolm.federate.server.whitening import FLOOR
from legolm.models import fingerprint, load_config, load_tokenizer, shape_of
from legolm.plan import make_plan
from legolm.prune import collect, load_statistics
from legolm.runs import RoundRecord, RunDir, read_stages, rounds_of
from legolm.system import Progress, derive_seed

CALIBRATION = {"text": "starter", "samples": 8, "length": 32}
READS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    found = three_clients(tmp_path, ("dense", "wide", "wide"), evaluate={"local_only": False})
    found["aggregate"] = {"scheme": "heteagg", "whiten": "starter"}
    return found


def validated(raw: dict[str, Any]) -> RunConfig:
    return configs.validate(RunConfig, raw, "test")


@pytest.mark.parametrize("text", ["starter", "clients"])
def test_the_rows_see_text_evenly(raw: dict[str, Any], tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path / "out")
    raw["aggregate"]["whiten"] = text
    if text == "clients":
        raw["blocks"][1]["calibration"] = {"statistics": "clients", "samples": 8, "length": 32}
    pipeline.run(validated(raw), run.path, models=False)
    base = Path(raw["model"])
    config = validated(raw)
    tokens = calibration_tokens(TextConfig(text="starter", samples=32, length=128), load_tokenizer(base), config.seed)
    whole = (
        load_statistics([run.sums], shape_of(load_config(base)), fingerprint(base))
        if text == "clients"
        else collect(base, fingerprint(base), tokens, "full", "fp32", Progress())
    )
    random = initial_factors(
        shape_of(load_config(base)), None, config.lora.rank, derive_seed(config.seed, "adapter"), True
    )
    made, ended = load_file(run.frozen), load_file(run.round(2) / "adapter.safetensors")
    assert made.keys() == {key for key in random if key.endswith(".A") and "o_proj" not in key and "down" not in key}
    for key, tensor in made.items():
        layer, module, _ = parse_key(key)
        part, _, last = module.rpartition(".")
        moments = whole.sums[f"layers.{layer}.{part}.{READS.get(last, last)}"]
        c = moments.sum.double() / moments.tokens
        a, r = tensor.double(), random[key].double()
        floor = FLOOR * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
        roots = torch.linalg.svd(c + floor)
        quarter = roots.U * roots.S**0.25 @ roots.U.T
        back = a @ quarter
        factor = (back * r).sum() / r.square().sum()
        torch.testing.assert_close(back, factor * r, rtol=0, atol=1e-4)
        torch.testing.assert_close((a @ c * a).sum(), (r @ c * r).sum(), rtol=1e-5, atol=0)
        # It stays: the rounds train beside it.
        assert torch.equal(ended[key], tensor)
        assert bool(ended[f"{key[:-1]}B"].any())


def test_they_come_with_the_block_and_in_no_round(raw: dict[str, Any], tmp_path: Path) -> None:
    """The block's slice of them, of the run's rank, which a client of a lower rank takes the first rows of."""
    raw["clients"][2]["rank"] = 2
    raw["blocks"].append({"name": "short", "method": "structured", "num_hidden_layers": 1, "calibration": CALIBRATION})
    raw["clients"].append({"id": "it", "blocks": ["wide", "short"]})
    (tmp_path / "data" / "it.jsonl").write_text((tmp_path / "data" / "fr.jsonl").read_text())
    run, plain = RunDir(tmp_path / "out"), RunDir(tmp_path / "plain")
    pipeline.run(validated(raw), run.path, models=False)
    whole = load_file(run.frozen)
    for name in ("dense", "wide", "short"):
        layers = {f"layers.{layer}" for layer in read_block(run.block(name)).coverage.layers}
        own = load_file(run.block(name) / FROZEN)
        assert own.keys() == {key for key in whole if key.rpartition(".self")[0] in layers or key[:8] in layers}
        assert all(torch.equal(tensor, whole[key]) for key, tensor in own.items())
    assert len(load_file(run.block("short") / FROZEN)) == len(whole) / 2
    raw["aggregate"].pop("whiten")
    pipeline.run(validated(raw), plain.path, models=False)
    sent = [
        [{id: (one.up, one.down) for id, one in record.bytes.items()} for record in records(one)]
        for one in (run, plain)
    ]
    assert all(
        abs(a - b) < 40
        for one, two in zip(*sent, strict=True)
        for id in one
        for a, b in zip(one[id], two[id], strict=True)
    )
    assert not any(record.refused for record in records(run))
    # The plan knows of them: a block's file has them, and so has the run.
    raw["aggregate"]["whiten"] = "starter"
    plans = [make_plan(validated(raw))]
    raw["aggregate"].pop("whiten")
    plans.append(make_plan(validated(raw)))
    for name, more in zip(("dense", "wide", "short"), (1, 1, 0.5), strict=True):
        sizes = [next(one.file_bytes for one in plan.blocks if one.name == name) for plan in plans]
        assert sizes[0] - sizes[1] == more * 4 * sum(tensor.numel() for tensor in whole.values())


def test_a_run_that_was_killed_ends_as_it_would_have(raw: dict[str, Any], tmp_path: Path) -> None:
    """With a block that has to be made again, and without the file that it is made of."""
    raw["federation"]["rounds"] = 3
    whole, half = RunDir(tmp_path / "whole"), RunDir(tmp_path / "half")
    pipeline.run(validated(raw), whole.path, models=False)
    shutil.copytree(whole.path, half.path)
    for number in (2, 3):
        shutil.rmtree(half.round(number))
    half.frozen.unlink()
    (half.block("wide") / FROZEN).write_bytes(b"")
    pipeline.run(validated(raw), half.path, resume=True, models=False)
    ends = [(run.round(3) / "adapter.safetensors").read_bytes() for run in (whole, half)]
    assert ends[0] == ends[1] and whole.frozen.read_bytes() == half.frozen.read_bytes()


@pytest.mark.parametrize("dp", [False, True])
def test_secure_sums_are_of_what_is_trained_beside_them(raw: dict[str, Any], tmp_path: Path, dp: bool) -> None:
    raw["privacy"] = {"secure": {"withheld_limit": 1}}
    raw["blocks"], raw["federation"]["rounds"] = raw["blocks"][:1], 3
    raw["clients"] = [one | {"block": "dense"} for one in raw["clients"]]
    if dp:
        raw["privacy"]["dp"] = {"level": "client", "noise": "distributed", "noise_multiplier": 4.0, "clip": 1e-3}
        raw["privacy"]["dp"]["delta"] = 1e-5
        raw["aggregate"]["weight"] = "equal"
    run = RunDir(tmp_path / "out")
    pipeline.run(validated(raw), run.path, models=False)
    assert all(record.closed == 0 for record in records(run)[1:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: made | {"more.A": torch.zeros(2, 2)}, "has other factors than this run"),
        (lambda made: {key: tensor[:1] for key, tensor in made.items()}, "not this block's"),
        (lambda made: {key: tensor.bfloat16() for key, tensor in made.items()}, "bfloat16, not this block's"),
        (lambda made: {key: tensor / 0 for key, tensor in made.items()}, "is not finite"),
        (None, "take the block that the run made"),
    ],
)
def test_a_block_with_others_is_refused(
    raw: dict[str, Any], tmp_path: Path, change: Callable[[Tensors], Tensors] | None, says: str
) -> None:
    run = RunDir(tmp_path / "out")
    raw["federation"]["rounds"] = 1
    pipeline.run(validated(raw), run.path, models=False)
    block = read_block(run.block("wide"))
    keys = [key for key in adapter_keys(block.coverage, None) if is_whitened(key, block.coverage.shape)]
    layout = adapter_layout(block.coverage, keys, validated(raw).lora.rank)
    made = load_frozen(block.path, layout)
    if change is None:
        (block.path / FROZEN).unlink()
    else:
        save_frozen(change(made), block.path)
    with pytest.raises(LegolmError, match=says):
        load_frozen(block.path, layout)


def records(run: RunDir) -> list[RoundRecord]:
    return rounds_of(read_stages(run.path / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"redraw": 1}, "whiten is of a frozen side that stays"),
        ({"whiten": ""}, "at least 1 character"),
        ({"form": "factor"}, "take form frozen_side and redraw 0, or leave it out"),
        ({"start": "earlier"}, "aggregate.start: another run's factors stand beside other frozen ones"),
        ({"whiten": "nowhere.txt"}, "aggregate.whiten.*nowhere.txt"),
        ({"whiten": "clients"}, "aggregate.whiten 'clients': needs their sums"),
    ],
)
def test_what_it_cannot_be_is_refused(raw: dict[str, Any], change: dict[str, Any], says: str) -> None:
    raw["aggregate"] |= change
    with pytest.raises(LegolmError, match=says):
        make_plan(validated(raw))


def test_squares_do_not_suffice(raw: dict[str, Any]) -> None:
    raw["aggregate"]["whiten"] = "clients"
    asked = {"statistics": "clients", "samples": 8, "length": 32}
    raw["blocks"][1] = {"name": "wide", "method": "wanda", "sparsity": 0.5, "calibration": asked}
    with pytest.raises(LegolmError, match=r"aggregate\.whiten: needs all second moments"):
        make_plan(validated(raw))


def test_what_has_nothing_to_whiten_is_refused(raw: dict[str, Any]) -> None:
    raw["lora"]["targets"] = ["o_proj"]
    with pytest.raises(LegolmError, match=r"aggregate\.whiten: makes factors that read the hidden state, of .*k_proj"):
        make_plan(validated(raw))
    del raw["lora"]["targets"]
    raw["federation"]["mode"] = "pooled"
    with pytest.raises(LegolmError, match=r"aggregate\.whiten: its factors come with blocks, and mode pooled has none"):
        make_plan(validated(raw))
