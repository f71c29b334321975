"""Clients that come and go, are late, swell, or train some layers or windows only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import load
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.server.gate import usual_size
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.plan import make_plan
from legolm.runs import RoundRecord, RunDir, Summary, read_stage


def test_clients_join_leave_and_are_drawn(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    raw["clients"][0]["leaves"] = 1
    raw["clients"][1]["joins"] = 2
    summary = run(load(raw, tmp_path))
    assert [entry.accepted for entry in summary.history] == [[], ["fr", "es"], ["de", "es"]]
    raw["clients"][0].pop("leaves"), raw["clients"][1].pop("joins")
    drawn = [run(load(raw, tmp_path, "federation.fraction=0.5"), f"half{i}").history for i in range(2)]
    accepted = [[entry.accepted for entry in history] for history in drawn]
    assert accepted[0] == accepted[1]
    assert [len(found) for found in accepted[0]] == [0, 2, 2]
    only = run(load(raw, tmp_path, "federation.capable=true"), "capable")
    assert [entry.accepted for entry in only.history] == [[], ["fr", "de"], ["fr", "de"]]


def test_a_round_with_nobody_is_refused_before_anything_is_cut(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["clients"][0]["leaves"], raw["clients"][1]["joins"], raw["clients"][2]["leaves"] = 1, 3, 2
    make_plan(load(raw, tmp_path, "federation.rounds=3"))
    with pytest.raises(LegolmError, match="round 2: no client takes part"):  # `es` has a block
        make_plan(load(raw, tmp_path, "federation.rounds=3", "federation.capable=true"))


def test_a_round_with_fewer_clients_than_it_needs_is_refused_before_anything_is_cut(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["clients"][0]["leaves"] = 1
    make_plan(load(raw, tmp_path, "federation.min_replies=2"))
    says = r"federation.min_replies: needs 3 clients, and 2 are asked in round 2; lower it, or change"
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, "federation.min_replies=3"))


def test_the_plan_says_what_a_robust_scheme_can_promise_under_this_coverage(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["lora"]["targets"] = ["up_proj"]
    said = make_plan(load(raw, tmp_path, "aggregate.scheme=median")).notes
    # A is held by all three; of B's 96 rows `wide` holds 48, and the other 48 are held by two: 48 of 64 + 96.
    assert len(said) == 1
    assert "no liar in 30 % of the entries (held by 2), 1 liar in 70 % of the entries (held by 3)" in said[0]
    assert "a liar among two cannot be outvoted" in said[0]
    assert make_plan(load(raw, tmp_path)).notes == ()


def test_late_replies_are_dropped_by_name(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=r"0 updates accepted.*fr: late: no answer within federation.deadline_s"):
        run(load(raw, tmp_path, "federation.deadline_s=0.000001"))


def swelling(client: str, number: int, factor: float) -> Callable[..., None]:
    """The local engine over a line on which one client's update of one round arrives much larger."""

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked: list[Request] = []
                for reply in exchange((asked.append(one) or one for one in requests), deadline_s):
                    request = asked[reply.index]
                    if request.client == client and wire.kind_of(reply.content) == "update":
                        header, delta = wire.unpack(reply.content, wire.UpdateReply)
                        if header.round == number:
                            delta = {key: factor * tensor for key, tensor in delta.items()}
                        reply = Reply(reply.index, wire.pack(header, delta))
                    yield reply

            return changed

        run_local(folder, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


def test_outliers_are_clipped_or_refused(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    engine = swelling("de", 2, 1000.0)
    found = {}
    for action in ("none", "clip", "refuse"):
        run(load(raw, tmp_path, f"aggregate.outliers.action={action}"), action, engine=engine)
        records = [json.loads(line) for line in (tmp_path / action / "metrics.jsonl").read_text().splitlines()]
        found[action] = records[-1]
        usual = usual_size([RoundRecord.model_validate(one) for one in records[:2]])
    assert usual is not None
    assert found["none"]["train"]["de"]["size"] > 100 * usual
    assert found["clip"]["train"]["de"]["size"] == pytest.approx(3 * usual, rel=1e-4)
    assert found["refuse"]["accepted"] == ["fr", "es"]
    assert "times the median of earlier rounds" in found["refuse"]["refused"][0]["reason"]


@pytest.mark.parametrize("form", ["factor", "frozen_side"])
def test_a_client_that_trains_some_layers_changes_and_sends_no_others(
    raw: dict[str, Any], run: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    raw["clients"][1]["layers"] = [1]  # Fed-HeLLo: the whole LLM, LoRA in its last layer
    raw["clients"] = raw["clients"][:2]
    overrides = ("federation.rounds=1", "federation.keep_updates=true", f"aggregate.form={form}")
    config = load(raw, tmp_path, *overrides, "aggregate.weight=equal")
    one, two = (client.id for client in config.clients)
    folder = RunDir(run_folder(run, config, tmp_path))
    record = read_stage(folder.round(1))
    assert isinstance(record, RoundRecord)
    assert record.accepted == [one, two]
    everything, some = (wire.unpack(folder.update(1, id).read_bytes(), wire.UpdateReply)[1] for id in (one, two))
    sizes = [sum(tensor.numel() for tensor in update.values()) for update in (everything, some)]
    assert sizes[1] * 2 == sizes[0]  # one of two equal layers
    planned = {client.id: client for client in make_plan(config).clients}
    assert planned[two].bytes_up * 2 == planned[one].bytes_up
    assert planned[two].bytes_down == planned[one].bytes_down  # its forward needs all layers' adapters

    # Layer 0 is the first client's alone, as in a run without the second; layer 1 is the mean of both.
    raw["clients"][1]["joins"] = 2
    alone = RunDir(run_folder(run, load(raw, tmp_path, *overrides), tmp_path, "alone"))
    start, both, single = (
        load_file(path / "adapter.safetensors") for path in (folder.round(0), folder.round(1), alone.round(1))
    )
    for key, tensor in both.items():
        stays = torch.equal(tensor, start[key])  # the frozen side
        assert torch.allclose(tensor, single[key], atol=1e-6) == ("layers.0." in key or stays), key


def run_folder(run: Callable[..., Any], config: RunConfig, tmp_path: Path, name: str = "out") -> Path:
    run(config, name)
    return tmp_path / name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clients.1.layers": [2]}, "layers: layer 2 is not in the block, which has 0, 1"),
        ({"clients.1.layers": []}, "clients.1.layers"),
        ({"clients.1.layers": [0], "aggregate.scheme": "fedavg", "clients.2.block": "dense"}, "trains some layers"),
        ({"clients.1.layers": [0], "clients.1.block": None, "clients.1.profile": {"memory_mb": 9e9}}, "with `block`"),
        (
            {"clients.2.layers": [1], "blocks.1.num_hidden_layers": 1},
            "which its block 'wide' keeps is chosen when it is cut",
        ),
    ],
)
def test_layers_that_a_client_cannot_train(raw: dict[str, Any], tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, *(f"{key}={json.dumps(value)}" for key, value in change.items())))


def test_a_window_that_rolls_trains_what_it_covers_in_the_round(
    raw: dict[str, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    """FedRolex: one client, half of the neurons in round 1, the other half in round 2, the first again in round 3."""
    neurons = 96
    raw["blocks"] = [
        {"name": f"at-{offset}", "method": "window", "intermediate_size": neurons // 2, "offset": offset}
        for offset in (0, neurons // 2)
    ]
    raw["clients"] = [{"id": raw["clients"][0]["id"], "blocks": ["at-0", "at-48"]}]
    config = load(raw, tmp_path, "federation.rounds=3", "federation.keep_updates=true", "federation.personal_steps=1")
    folder = RunDir(run_folder(run, config, tmp_path))
    after = [load_file(folder.round(number) / "adapter.safetensors")["layers.1.mlp.up_proj.B"] for number in range(4)]
    first = torch.arange(neurons) < neurons // 2
    for (old, new), window in zip(pairwise(after), (first, ~first, first), strict=True):
        assert torch.equal((new != old).any(1), window)
    sent = [wire.unpack(folder.update(n, config.clients[0].id).read_bytes(), wire.UpdateReply)[0] for n in (1, 2, 3)]
    assert [one.block for one in sent] == ["at-0", "at-48", "at-0"]
    run(config, "out", models=True, resume=True)
    assert read_block(folder.final(config.clients[0].id)).name == "at-0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clients.0.blocks": ["dense", "wide"]}, "give one of `block`, `blocks` and `profile`"),
        ({"clients.0.block": None, "clients.0.blocks": ["dense", "wild"]}, "wants block 'wild'; did you mean `wide`"),
        (
            {"clients.0.block": None, "clients.0.blocks": ["dense", "wide"], "aggregate.scheme": "hetlora"},
            "trains another block in each round",
        ),
        (
            {"clients.0.block": None, "clients.0.blocks": ["dense", "wide"], "federation.codec": "int8"},
            "federation.error_feedback: client .* trains another block in each round",
        ),
    ],
)
def test_blocks_that_cannot_take_turns(raw: dict[str, Any], tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, *(f"{key}={json.dumps(value)}" for key, value in change.items())))
