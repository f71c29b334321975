"""A region behind a relay ends where its devices end that the server asks itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.client import Answering, Holdings, Piece, Profile, Resident
from legolm.federate.relay import Relay
from legolm.federate.relay.region import _together
from legolm.federate.transport.deployment import Asking, Those
from legolm.federate.wire import ScoreReply, UpdateReply, Welcome, kind_of, pack, unpack
from legolm.runs import RunDir, Score, Summary
from legolm.system import derive_seed
from residents import Residents

Make = Callable[..., dict[str, Any]]


def setting(make: Make, folder: Path, **federation: Any) -> dict[str, Any]:
    alone = {"scores": "own", "local_only": False}
    raw = make(folder, ("dense",) * 3, evaluate=alone, aggregate={"weight": "examples"})
    raw["federation"] |= federation
    return raw


def relayed(
    raw: dict[str, Any], folder: Path, other: Callable[[Piece], Answering] | None = None
) -> tuple[Summary, list[str]]:
    """The same run, where a relay answers for `fr` and `de`, which may be `other`; and what that said."""
    clients = [{"id": "north", "block": "dense", "relay": True}, {"id": "es", "block": "dense"}]
    data = {name: value for name, value in raw["data"].items() if name != "train"}
    federation = raw["federation"] | {"engine": "deployment", "superlink": {"address": "127.0.0.1:1"}}
    changes = {"clients": clients, "data": data, "federation": federation}
    config, said = configs.validate(RunConfig, raw | changes, "test"), list[str]()
    region, outer = Residents(folder, ["fr", "de"]), Residents(folder, ["north", "es"])
    if other is not None:
        region.others["de"] = other

    def north(piece: Piece) -> Answering:
        def give(name: str, id: str, place: Path) -> None:
            if not (folder / "region" / name).exists():
                (folder / "region").mkdir(exist_ok=True)
                (folder / "region" / name).symlink_to(place)
                region.begin(folder / "region")

        def exchange(requests: Any, deadline_s: float | None = None) -> Any:
            yield from asking.exchange(requests, deadline_s)

        found = Relay(folder / "north", "north", piece, lambda: ["fr", "de"], exchange, give, said.append)
        those = Those(folder / "north" / "region", lambda: ["fr", "de"], found.told, lambda: found.round)
        asking = Asking(those, region, said.append)  # type: ignore[arg-type]
        return found

    (folder / "north" / "region").mkdir(parents=True)
    outer.others["north"] = north
    return pipeline.run(config, folder / "relayed", engine=outer, models=False), said


def test_a_region_is_its_devices(three_clients: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = setting(three_clients, tmp_path)
    raw["aggregate"]["whiten"] = "starter"  # the frozen side comes with the block, to the relay and from it
    config = configs.validate(RunConfig, raw, "test")
    flat = pipeline.run(config, tmp_path / "flat", models=False)
    seeds = {derive_seed(config.seed, "round", number, "north"): number for number in (1, 2)}

    def same_chance(seed: int, id: str) -> int:
        return derive_seed(config.seed, "round", seeds[seed], id)

    monkeypatch.setattr("legolm.federate.relay.region.derive_seed", same_chance)
    found, said = relayed(raw, tmp_path)
    assert [line for line in said if "the sum of" in line] == [f"round {n}: the sum of 2 of 2 devices" for n in (1, 2)]
    for number, close in ((1, 1e-7), (2, 1e-4)):  # Adam makes much of what rounding made of round 1
        paths = (RunDir(tmp_path / name).round(number) / "adapter.safetensors" for name in ("flat", "relayed"))
        one, two = map(load_file, paths)
        assert one.keys() == two.keys() and max(float(tensor.abs().max()) for tensor in one.values()) > 1e-2
        for key, tensor in one.items():
            assert torch.allclose(tensor, two[key], rtol=0, atol=close), key
    assert found.history[-1].accepted == ["north", "es"] and flat.history[-1].accepted == ["fr", "de", "es"]


class Liar(Resident):
    """Says as much as one reply may say."""

    def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
        found = super()._work(told, welcome, request, until)
        if kind_of(found) == "scores":
            scores = [score.model_copy(update={"tokens": 10**12}) for score in unpack(found, ScoreReply)[0].scores]
            return pack(ScoreReply(scores=scores), {})
        header, tensors = unpack(found, UpdateReply)
        lie = {"examples": 10**9} if header.round == 1 else {"metrics": header.metrics | {"tokens": 1e15}}
        return pack(header.model_copy(update=lie), tensors)


def test_a_liar_in_a_region_is_named_and_costs_nobody_else(three_clients: Make, tmp_path: Path) -> None:
    raw = setting(three_clients, tmp_path)
    held = Holdings(tmp_path / "liar", (f"{tmp_path}/data/de.jsonl",), profile=Profile("cpu"))
    found, said = relayed(raw, tmp_path, lambda piece: Liar(held, "de", piece, print))
    assert [(one.accepted, one.unscored) for one in found.history[1:]] == [(["north", "es"], [])] * 2
    for line in (
        "evaluate: de: its score on test data of 'de' has exact_match",
        "round 1: de: says it has 1,000,000,000 examples; a device of this region may have 500,000,000",
        "round 2: de: metrics.tokens is 1e+15; at most 5e+14 is taken",
    ):
        assert any(one.startswith(line) for one in said), line


def test_a_region_that_answers_all_right_is_believed() -> None:
    scores = [Score(loss=0.5, exact_match=1.0, tokens=count, examples=count) for count in (10, 12, 6, 5)]
    assert _together(scores).exact_match == 1  # and not the 1.0000000000000002 that a server refuses


def test_what_a_relay_cannot_be(three_clients: Make, tmp_path: Path) -> None:
    raw = setting(three_clients, tmp_path, engine="deployment")
    raw["clients"][0]["relay"] = True
    configs.validate(RunConfig, raw, "test")
    for changes, says in (
        ({"aggregate": {"weight": "capped"}}, "set it to examples"),
        ({"aggregate": {"scheme": "median", "weight": "examples"}}, "needs each by itself"),
        ({"aggregate": {"redraw": 1, "weight": "examples"}}, "needs each by itself"),
        ({"privacy": {"secure": {}}}, "take privacy.secure and privacy.dp out"),
        ({"evaluate": {"scores": "own"}}, "has no training of its own"),
        (
            {"aggregate": {"weight": "examples", "outliers": {"action": "refuse", "factor": 2}}},
            "shows no single change to judge; set aggregate.outliers.action to none",
        ),
        ({"federation": raw["federation"] | {"engine": "local"}}, "is a process of its own"),
    ):
        with pytest.raises(LegolmError, match=says):
            configs.validate(RunConfig, raw | changes, "test")
