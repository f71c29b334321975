"""Messages: round trip, and what the gate in front of the aggregation refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from legolm import wire
from legolm.coverage import Coverage, init_factors, slice_factors, tensors_hash
from legolm.models import Shape
from legolm.types import LegolmError, Tensors

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
COVERAGE = Coverage(SHAPE, (1,), ((0,),), ((0, 2),))
SENT = slice_factors(COVERAGE, init_factors(SHAPE, ["up_proj"], 2, seed=0), 2)
REQUEST = wire.TrainRequest(
    run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=2.0,
    phase="round", round=3, steps=4, done=8, total=12, seed=5,
)  # fmt: skip
GIVEN = wire.Sent(SENT, SENT, frozenset(SENT), tensors_hash(SENT))
KEY = "layers.1.mlp.up_proj.B"


def reply(delta: Tensors | None = None, **changes: object) -> bytes:
    header = wire.UpdateReply(
        **{field: getattr(REQUEST, field) for field in wire.REPLIED},
        received_hash=GIVEN.hash,
        examples=7,
        metrics={"loss": 1.0},
    ).model_copy(update=changes)
    return wire.pack(header, {k: torch.ones_like(t) for k, t in SENT.items()} if delta is None else delta)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {key: change(tensor) if key == KEY else tensor.clone() for key, tensor in SENT.items()}


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


def test_round_trip() -> None:
    header, tensors = wire.unpack(wire.pack(REQUEST, SENT), wire.TrainRequest)
    assert header == REQUEST
    assert all(torch.equal(tensors[key], tensor) for key, tensor in SENT.items())
    update = wire.accept(reply(), REQUEST, GIVEN, COVERAGE)
    assert (update.client, update.examples, update.rank, update.metrics) == ("fr", 7, 2, {"loss": 1.0})
    assert all(bool((tensor == 1).all()) for tensor in update.delta.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (reply(changed(with_nan)), f"{KEY} is not finite"),
        (reply(changed(lambda t: t[:1])), r"has shape \(1, 2\); the block's is \(2, 2\)"),
        (reply(changed(lambda t: t.half())), "is torch.float16; must be float32"),
        (reply({KEY: SENT[KEY]}), r"layers\.1\.mlp\.up_proj\.A is missing"),
        (reply(SENT | {"layers.0.mlp.up_proj.A": torch.zeros(2, 4)}), r"layers\.0.* was not asked for"),
        (reply(base_fingerprint="other"), "base_fingerprint is 'other'; asked for 'f'"),
        (reply(coverage_hash="other"), "coverage_hash is 'other'"),
        (reply(received_hash="other"), "received_hash is 'other'"),
        (reply(round=2), "round is 2; asked for 3"),
        (reply(rank=3), "rank is 3"),
        (reply(scale=1.0), "scale is 1.0"),
        (reply(client="de"), "client is 'de'"),
        (reply(run="x"), "run is 'x'"),
        (reply(examples=0), "examples is 0"),
        (wire.pack(REQUEST, SENT), "message header"),
        (b"", "message is broken"),
        (b"\xff" * 64, "message is broken"),
        (reply()[:-5], "message is broken"),
        (save(SENT), "message is broken"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(content: bytes, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        wire.accept(content, REQUEST, GIVEN, COVERAGE)
