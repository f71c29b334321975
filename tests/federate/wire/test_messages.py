"""Messages: round trip, and what the gate in front of the aggregation refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from legolm.adapter import Tensors, init_factors, slice_factors, tensors_hash
from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.federate.wire import codec
from legolm.federate.wire import messages as wire
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
COVERAGE = Coverage(SHAPE, (1,), ((0,),), ((0, 2),))
SENT = slice_factors(COVERAGE, init_factors(SHAPE, ["up_proj"], 2, seed=0), 2)
REQUEST = wire.TrainRequest(
    run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=2.0,
    phase="round", round=3, steps=4, done=8, total=12, seed=5,
)  # fmt: skip
CONTENT = codec.encode(SENT, "none")
GIVEN = wire.Sent(CONTENT, SENT, codec.Layout.of(SENT), 0, tensors_hash(CONTENT))
COUNT = sum(tensor.numel() for tensor in SENT.values())
KEY = "layers.1.mlp.up_proj.B"


def reply(content: Tensors | None = None, **changes: object) -> bytes:
    header = wire.UpdateReply(
        **{field: getattr(REQUEST, field) for field in wire.REPLIED},
        received_hash=GIVEN.hash,
        examples=7,
        metrics={"loss": 1.0},
    ).model_copy(update=changes)
    return wire.pack(header, {"factors": torch.ones(COUNT)} if content is None else content)


def with_nan() -> Tensors:
    change = {key: torch.ones_like(tensor) for key, tensor in SENT.items()}
    change[KEY][0, 0] = float("nan")
    return codec.encode(change, "none")


def test_round_trip() -> None:
    header, tensors = wire.unpack(wire.pack(REQUEST, CONTENT), wire.TrainRequest)
    assert header == REQUEST
    arrived = codec.decode(tensors, "none", GIVEN.trained)
    assert all(torch.equal(arrived[key], tensor) for key, tensor in SENT.items())
    update = wire.accept(reply(), REQUEST, GIVEN)
    assert (update.client, update.examples, update.rank, update.metrics) == ("fr", 7, 2, {"loss": 1.0})
    assert all(bool((tensor == 1).all()) for tensor in update.delta.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (reply(with_nan()), f"{KEY} is not finite"),
        (
            reply({"factors": torch.ones(COUNT - 1)}),
            rf"factors has shape \({COUNT - 1},\); the block's is \({COUNT},\)",
        ),
        (reply({"factors": torch.ones(COUNT).half()}), "is torch.float16; must be float32"),
        (reply({}), "factors is missing"),
        (reply({"factors": torch.ones(COUNT), "scales": torch.ones(1)}), "scales was not asked for"),
        (reply(base_fingerprint="other"), "base_fingerprint is 'other'; asked for 'f'"),
        (reply(coverage_hash="other"), "coverage_hash is 'other'"),
        (reply(received_hash="other"), "received_hash is 'other'"),
        (reply(round=2), "round is 2; asked for 3"),
        (reply(rank=3), "rank is 3"),
        (reply(scale=1.0), "scale is 1.0"),
        (reply(client="de"), "client is 'de'"),
        (reply(run="x"), "run is 'x'"),
        (reply(examples=0), "examples is 0"),
        (wire.pack(REQUEST, CONTENT), "message header"),
        (b"", "message is broken"),
        (b"\xff" * 64, "message is broken"),
        (reply()[:-5], "message is broken"),
        (save(CONTENT), "message is broken"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(content: bytes, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        wire.accept(content, REQUEST, GIVEN)
