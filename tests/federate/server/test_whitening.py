"""Frozen factors that are made of public text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import initial_factors, parse_key
from legolm.config import RunConfig, TextConfig
from legolm.data import calibration_tokens
from legolm.errors import LegolmError
from legolm.federate.server.whitening import FLOOR
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.models import fingerprint, load_config, load_tokenizer, shape_of
from legolm.plan import make_plan
from legolm.prune import collect, load_statistics
from legolm.runs import RunDir, read_stages, rounds_of
from legolm.system import Progress, derive_seed

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


def test_each_client_is_sent_them_once(raw: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    raw["federation"]["rounds"] = 3
    raw["clients"][2]["joins"] = 2
    raw["evaluate"]["every"] = 3
    pipeline.run(validated(raw), run.path, models=False)
    down = [
        {id: one.down for id, one in record.bytes.items()}
        for record in rounds_of(read_stages(run.path / "metrics.jsonl"))
    ]
    side = 4 * sum(tensor.numel() for tensor in load_file(run.frozen).values())
    first, second, *_ = raw["clients"]
    for id in (first["id"], second["id"]):
        assert side < down[1][id] - down[2][id] < side + 500 and abs(down[2][id] - down[3][id]) < 20
    late = raw["clients"][2]["id"]
    assert late not in down[1] and side < down[2][late] - down[3][late] < side + 500
    said = " ".join(make_plan(validated(raw)).notes)
    assert f"go to each client once, {side / 1e6:,.1f} MB at most" in said


def test_a_run_that_was_killed_ends_as_it_would_have(raw: dict[str, Any], tmp_path: Path) -> None:
    """The clients have theirs from the rounds before."""
    raw["federation"]["rounds"] = 3
    whole, half = RunDir(tmp_path / "whole"), RunDir(tmp_path / "half")
    pipeline.run(validated(raw), whole.path, models=False)
    shutil.copytree(whole.path, half.path)
    shutil.rmtree(half.round(3))
    half.frozen.unlink()  # what is made again is what was
    pipeline.run(validated(raw), half.path, resume=True, models=False)
    ends = [(run.round(3) / "adapter.safetensors").read_bytes() for run in (whole, half)]
    assert ends[0] == ends[1] and whole.frozen.read_bytes() == half.frozen.read_bytes()


def test_who_lost_them_is_refused_once(raw: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out")
    raw["federation"]["rounds"] = 4
    first = raw["clients"][0]["id"]

    def forgetful(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def work(exchange: Exchange) -> None:
            def asks(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                if folder.round(1).exists() and not folder.round(2).exists():
                    shutil.rmtree(folder.client_state(first), ignore_errors=True)
                return exchange(requests, deadline_s)

            body(asks)

        run_local(folder, config, actors, work)

    pipeline.run(validated(raw), run.path, engine=forgetful, models=False)
    records = rounds_of(read_stages(run.path / "metrics.jsonl"))
    assert [[one.client for one in record.refused] for record in records] == [[], [], [first], [], []]
    assert "are gone from its state" in records[2].refused[0].reason
    # Their way back costs as much as the first one.
    down = [record.bytes[first].down for record in records[1:]]
    side = 4 * sum(tensor.numel() for tensor in load_file(run.frozen).values())
    assert abs(down[2] - down[0]) < 50 and down[0] - down[3] > side


def test_blocks_in_turn_each_get_their_own(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["blocks"].append(
        {
            "name": "short",
            "method": "structured",
            "num_hidden_layers": 1,
            "calibration": raw["blocks"][1]["calibration"],
        }
    )
    raw["clients"][2] = {"id": raw["clients"][2]["id"], "blocks": ["wide", "short"]}
    raw["federation"]["rounds"] = 3
    run = RunDir(tmp_path / "out")
    pipeline.run(validated(raw), run.path, models=False)
    assert not any(record.refused for record in rounds_of(read_stages(run.path / "metrics.jsonl")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"redraw": 1}, "whiten is of a frozen side that stays"),
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
