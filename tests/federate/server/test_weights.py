"""A client that claims a thousand million examples does not own the round, and the plan says who counts less."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.federate import wire
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.runs import RunDir, read_stages, rounds_of


def claiming(claims: dict[str, int], factor: float) -> Callable[..., None]:
    """The local engine; some clients claim so many examples, and what they learned arrives so much larger."""

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                for reply in exchange(requests, deadline_s):
                    if wire.kind_of(reply.content) == "update":
                        header, delta = wire.unpack(reply.content, wire.UpdateReply)
                        if header.client in claims:
                            header = header.model_copy(update={"examples": claims[header.client]})
                            delta = {key: factor * tensor for key, tensor in delta.items()}
                        reply = replace(reply, content=wire.pack(header, delta))
                    yield reply

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Three dense clients."""
    found = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    found["data"] |= {"limit_test": 1, "limit_validation": 1}
    found["federation"]["rounds"] = 1
    return found


def test_a_claim_of_a_thousand_million_examples_does_not_own_the_round(raw: dict[str, Any], tmp_path: Path) -> None:
    """One update of zero with a huge claim leaves others half of the round; without the cap it leaves nothing."""
    moved = {}
    for name, claims, weight in (
        ("honest", {"de": 7}, "capped"),
        ("liar", {"de": 10**9}, "capped"),
        ("uncapped", {"de": 10**9}, "examples"),
    ):
        config = configs.validate(RunConfig, raw | {"aggregate": {"weight": weight}}, "test")
        pipeline.run(config, tmp_path / name, engine=claiming(claims, 0.0), store=tmp_path / "store", models=False)
        states = (load_file(tmp_path / name / "rounds" / f"000{n}" / "adapter.safetensors") for n in (0, 1))
        before, after = (torch.cat([state[key].flatten() for key in sorted(state)]) for state in states)
        moved[name] = after - before
        record = rounds_of(read_stages(tmp_path / name / "metrics.jsonl"))[1]
        expected = {"honest": (1 / 3, 1 / 3), "liar": (0.5, 0.25), "uncapped": (1.0, 0.0)}[name]
        assert (record.shares["de"], record.shares["fr"]) == pytest.approx(expected, abs=1e-6)
    assert float(moved["honest"].norm()) > 0
    torch.testing.assert_close(moved["liar"], 0.75 * moved["honest"], atol=1e-6, rtol=1e-3)  # half of all, not a third
    assert float(moved["uncapped"].norm()) < 1e-6 * float(moved["honest"].norm())


def test_the_dry_run_says_whose_weight_is_capped(raw: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}", "output": "ab"} for i in range(100)]
    (tmp_path / "data" / "de.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))

    def said(*overrides: str) -> str:
        sets = [part for one in overrides for part in ("--set", one)]
        done = legolm("run", path, "--dry-run", "--out", tmp_path / "out", *sets)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # 70 of 84: of 100 and 10 rows seven tenths train.
    assert "If all reply, de (83 % of the examples) count as 50 % of a round each (aggregate.weight_cap)." in said()
    assert "All 3 clients count the same, whatever their examples" in said("aggregate.weight_cap=0.3")
    quiet = ("weight_cap=0.9", "weight=examples", "weight=equal", "scheme=median", "scheme=hetlora")
    assert not any("weight_cap" in said(f"aggregate.{one}") for one in quiet)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("aggregate.weight=capt",), ("aggregate.weight", "'examples', 'equal' or 'capped'")),
        (("aggregate.weight_cap=0",), ("aggregate.weight_cap", "greater than 0")),
        (("aggregate.weight_cap=1.5",), ("aggregate.weight_cap", "less than or equal to 1")),
        (("aggregate.weight=equal", "aggregate.weight_cap=0.2"), ("weight_cap 0.2 is of weight 'capped'",)),
        (("aggregate.scheme=median", "aggregate.weight=equal"), ("'median' weighs clients in its own way",)),
    ],
)
def test_weights_that_do_not_go_are_refused(
    overrides: tuple[str, ...], says: tuple[str, ...], raw: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    sets = [part for one in overrides for part in ("--set", one)]
    assert_one_line(legolm("run", path, "--dry-run", "--out", tmp_path / "out", *sets), *says)
