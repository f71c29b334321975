"""Rounds that are over with a buffer of updates: late ones come tagged, and count by their entries' age."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from legolm import config as configs
from legolm import pipeline
from legolm.block import llm_block, read_block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server import Rounds, pace
from legolm.models import resolve
from legolm.plan import make_plan
from legolm.runs import RoundRecord, RunDir, read_stages, rounds_of
from legolm.system import Progress
from residents import Residents

PACES = {"fr": 1.0, "de": 1.1, "es": 2.5}


@pytest.fixture
def run(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[RunDir, RunConfig, list[RoundRecord]]]:
    """A run of these rounds with a buffer, in which `es` is slow; its rounds."""
    monkeypatch.setattr(pace, "_pace", lambda seed, client: PACES[client])
    raw = three_clients(tmp_path, ("wide", "wide", "dense"), evaluate={"scores": "own", "local_only": False})
    raw["evaluate"]["every"] = 100
    raw["train"]["steps"] = 1

    def go(out: str, rounds: int, resume: bool = False, **federation: Any) -> Any:
        config = configs.validate(
            RunConfig,
            raw | {"federation": {"engine": "local", "rounds": rounds, "keep_updates": True} | federation},
            "",
        )
        folder = RunDir(tmp_path / out)
        pipeline.run(config, folder.path, resume=resume, models=False)
        return folder, config, rounds_of(read_stages(folder.path / "metrics.jsonl"))

    return go


def test_slow_clients_come_later(run: Callable[..., tuple[RunDir, RunConfig, list[RoundRecord]]]) -> None:
    run("out", 3, buffer=2, codec="int8")  # and, once it was stopped, on: with what each client kept of its own
    folder, config, rounds = run("out", 4, resume=True, buffer=2, codec="int8")
    # At 1.1 fr and de are there; at 2.2 both again; at 2.5 es from round 1 and, at 3.2, fr; then de, asked in round 3,
    # at 3.3 and fr at 4.2.
    assert [one.accepted for one in rounds[1:]] == [["fr", "de"], ["fr", "de"], ["fr", "es"], ["fr", "de"]]
    assert [one.tags for one in rounds[1:]] == [{}, {}, {"es": 1}, {"de": 3}]
    assert [one.waiting for one in rounds[1:]] == [{"es": 1}, {"es": 1}, {"de": 3}, {"es": 4}]

    # The updates that were kept give the run's factors again, discounted as they were.
    blocks = {"llm": llm_block(resolve(config.model), folder.identity().base_fingerprint)}
    blocks |= {name: read_block(folder.block(name)) for name in ("wide", "dense")}
    block_of = {one.id: one.named[0] for one in config.clients}
    found = Rounds(folder, config, folder.identity().run, blocks, block_of, Progress())
    state, expected = found.replay(4, []).state(), found.scheme(4).state()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_a_buffer_for_all_waits_for_all() -> None:
    asked = {"fr": 2, "de": 1, "es": 2}
    client = {"data": "starter", "blocks": [{"name": "a", "method": "dense"}]}
    raw = client | {"clients": [{"id": id, "block": "a"} for id in asked], "federation": {"buffer": 3}}
    config = configs.validate(RunConfig, raw, "test")
    rounds = [RoundRecord(round=0, llm=None, held=[], validation=None, llm_validation=None, seconds=0.0)]
    rounds += [rounds[0].model_copy(update={"round": 1, "accepted": ["fr", "es"], "waiting": {"de": 1}})]
    assert pace.asked(config, rounds, 2, ["fr", "de", "es"]) == asked
    assert pace.first_to_end(config, rounds, asked) == list(asked)


def test_devices_train_nothing_twice(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Who was not waited for is asked the same again in the next round, and has the answer."""
    raw = three_clients(tmp_path, ("wide", "wide", "dense"), evaluate={"scores": "own", "local_only": False})
    raw["evaluate"]["every"], raw["train"]["steps"] = 2, 1
    superlink = {"address": "127.0.0.1:1"}
    raw["federation"] = {"engine": "deployment", "rounds": 2, "buffer": 2, "superlink": superlink}
    devices = Residents(tmp_path, ("fr", "de", "es"))
    config = configs.validate(RunConfig, raw, "test")
    often = configs.validate(RunConfig, raw | {"evaluate": raw["evaluate"] | {"every": 1}}, "test")
    assert any(note.startswith("Scoring waits for every device, after each round") for note in make_plan(often).notes)
    assert not make_plan(config).notes
    pipeline.run(config, tmp_path / "out", engine=devices, models=False)
    rounds = rounds_of(read_stages(tmp_path / "out" / "metrics.jsonl"))
    # The largest block is asked first, and who was asked before, before others with the same.
    assert [one.accepted for one in rounds[1:]] == [["fr", "es"], ["de", "es"]]
    assert [one.waiting for one in rounds[1:]] == [{"de": 1}, {"fr": 2}] and rounds[2].tags == {"de": 1}
    trained = {id: sum("train: answered" in line for line in said) for id, said in devices.said.items() if id}
    assert trained == {"fr": 2, "de": 1, "es": 2}


def test_where_nothing_can_come_late(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = three_clients(tmp_path, ("dense",) * 3)

    def refused(**changes: Any) -> str:
        federation = raw["federation"] | {"buffer": 2} | changes.pop("federation", {})
        with pytest.raises(LegolmError) as caught:
            configs.validate(RunConfig, raw | changes | {"federation": federation}, "test")
        return str(caught.value)

    said = refused(aggregate={"scheme": "heteagg", "redraw": 1})
    assert "federation.buffer: an update of an earlier round" in said and "fedavg" in said and "flora" not in said
    assert "federation.buffer: an update of an earlier round" in refused(aggregate={"scheme": "median"})
    private = {"aggregate": {"weight": "equal"}, "privacy": {"dp": {"level": "client", "epsilon": 1, "delta": 1e-5}}}
    assert "federation.buffer adds it to others; take it out" in refused(**private)
    assert "federation.buffer is 4; there are 3 clients" in refused(federation={"buffer": 4})
    assert "mode 'pooled' has none" in refused(federation={"mode": "pooled"})
    assert "federation.min_replies is 3, and a round is over with" in refused(federation={"min_replies": 3})
