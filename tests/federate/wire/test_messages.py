"""Messages: round trip, and what the gate in front of the aggregation refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from legolm.adapter import Tensors, init_factors, slice_factors
from legolm.block import Coverage
from legolm.config import TrainConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.wire.messages import REPLIED
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
COVERAGE = Coverage(SHAPE, (1,), ((0,),), ((0, 2),))
SENT = slice_factors(COVERAGE, init_factors(SHAPE, ["up_proj"], 2, seed=0), 2)
SETTINGS = wire.TrainSettings(
    targets=["up_proj"], run_rank=2, ranks={}, dropout=0.0, train=TrainConfig(), precision="fp32", frozen_side=False,
    derived_seed=None, proximal=0.0, codec="none", keep=1.0, error_feedback=True,
)  # fmt: skip
GIVEN = wire.write(SETTINGS, COVERAGE, 2, SENT, {})
REQUEST = wire.TrainRequest(
    run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=2.0,
    phase="round", round=3, steps=4, done=8, total=12, seed=5, settings=GIVEN.settings,
)  # fmt: skip
TOLD = {"loss_first": 2.0, "loss_last": 1.0, "steps": 4.0, "tokens": 90.0, "seconds": 0.5}
COUNT = sum(tensor.numel() for tensor in SENT.values())
KEY = "layers.1.mlp.up_proj.B"


def reply(content: Tensors | None = None, **changes: object) -> bytes:
    header = wire.UpdateReply(
        **{field: getattr(REQUEST, field) for field in REPLIED},
        received_hash=GIVEN.hash,
        examples=7,
        metrics=TOLD,
    ).model_copy(update=changes)
    return wire.pack(header, {"factors": torch.ones(COUNT)} if content is None else content)


def with_header(**entries: object) -> bytes:
    """A message whose tensors' entries are these, over a few bytes."""
    header = {"__metadata__": {"legolm": "{}"}} | entries
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"0" * 64


def one(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


def with_nan() -> Tensors:
    change = {key: torch.ones_like(tensor) for key, tensor in SENT.items()}
    change[KEY][0, 0] = float("nan")
    return wire.encode(change, "none")


def test_round_trip() -> None:
    header, tensors = wire.unpack(wire.pack(REQUEST, GIVEN.content), wire.TrainRequest)
    assert header == REQUEST
    arrived = wire.decode(tensors, "none", GIVEN.trained)
    assert all(torch.equal(arrived[key], tensor) for key, tensor in SENT.items())
    update = wire.accept(reply(), REQUEST, GIVEN)
    assert (update.envelope.client, update.change.examples, update.change.rank) == ("fr", 7, 2)
    assert update.training.model_dump(exclude_none=True) == TOLD | {"truncated": 0.0}
    assert all(bool((tensor == 1).all()) for tensor in update.change.delta.values())


def test_a_client_opens_what_the_server_wrote() -> None:
    """One full cycle in each form: what is trained from, what does not train, and what changes the base."""
    fold = {key: torch.full((3, t.shape[1]) if key.endswith("A") else (t.shape[0], 3), 0.5) for key, t in SENT.items()}
    for frozen, seed, trained in ((False, None, "AB"), (True, 9, "B"), (False, 9, "AB")):
        settings = SETTINGS.model_copy(update={"frozen_side": frozen, "derived_seed": seed})
        fresh = seed is not None and not frozen
        payload = {} if fresh else {key: t for key, t in SENT.items() if key[-1] in trained}
        written = wire.write(settings, COVERAGE, 2, payload, fold)
        asked = REQUEST.model_copy(update={"settings": written.settings})
        opened = wire.open_(asked, COVERAGE, written.content)
        assert set(opened.start) == set(SENT)
        assert {key[-1] for key in opened.start if key not in opened.frozen} == set(trained)
        assert all(torch.equal(opened.start[key], tensor) for key, tensor in payload.items())
        assert all(torch.equal(opened.start[key], tensor) for key, tensor in written.received("fr").items())
        assert all(torch.equal(opened.fold[key], tensor) for key, tensor in fold.items())


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
        (reply(examples=0), "examples: Input should be greater than or equal to 1"),
        (reply(metrics={}), "metrics.loss_first: field required"),
        (wire.pack(REQUEST, GIVEN.content), "message header"),
        (b"", "message is broken"),
        (b"\xff" * 64, "message is broken"),
        (reply()[:-5], "message is broken"),
        (save(GIVEN.content), "message is broken"),
        (with_header(factors=one(shape=["x", 20_000_000_000])), "factors: its size does not fit"),
        (with_header(factors=one(shape=[10**200] * 3)), "factors: its size does not fit"),
        (with_header(factors=one(shape=[1] * 5)), "factors: its size does not fit"),
        (with_header(factors=one(shape=[True])), "factors: its size does not fit"),
        (with_header(factors=one(data_offsets=[-4, 0])), "factors: its size does not fit"),
        (with_header(**{f"t{i}": one() for i in range(17)}), "17 tensors; at most 16"),
        (with_header(**{"n" * 70_000: one()}), "its header has 70[0-9]* bytes; at most 65536"),
        (with_header(factors=one(shape=json.loads("[" * 900 + "]" * 900))), "message is broken"),
        (reply(examples=10**400), "examples: Input should be less than or equal to 1000000000"),
        (reply(metrics=TOLD | {"loss_last": float("inf")}), "metrics.loss_last: Input should be a finite number"),
        (
            reply(metrics=TOLD | {"loss_last": 1e308}),
            "metrics.loss_last: Input should be less than or equal to 1000000",
        ),
        (reply(metrics=TOLD | {"tokens": -1.0}), "metrics.tokens: input should be greater than or equal to 0"),
        (reply(metrics=TOLD | {"x" * 129: 1.0}), "should have at most 128 characters"),
        (reply(metrics=TOLD | {"a\x1b[31m": 1.0}), "should match pattern"),
        (reply(metrics=TOLD | {f"m{i}": 1.0 for i in range(60)}), "should have at most 64 items"),
        (reply(run="r\n"), "run: String should match pattern"),
        (reply({"factors": torch.full((COUNT,), 1e38)}), r"layers.* has a change of 1e\+38; at most 10000 is taken"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(content: bytes, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        wire.accept(content, REQUEST, GIVEN)


def answered(change: Tensors, lost: Tensors, **settings: object) -> tuple[Tensors, Tensors]:
    """What arrives of a client's change, and what it keeps for the next."""
    asked = REQUEST.model_copy(update={"settings": SETTINGS.model_copy(update=settings)})
    content, left = wire.answer(asked, GIVEN.content, change, 7, TOLD, lost)
    return dict(wire.accept(content, asked, GIVEN).change.delta), left


def test_what_saliency_leaves_out_is_fed_back() -> None:
    rising = {key: torch.arange(1.0, 1 + t.numel()).view_as(t) for key, t in SENT.items()}
    first, left = answered(rising, {}, keep=0.5)
    assert first[KEY].tolist() == [[0.0, 0.0], [3.0, 4.0]]
    assert left[KEY].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    ones = {key: torch.ones_like(tensor) for key, tensor in SENT.items()}
    second, left = answered(ones, left, keep=0.5)
    assert second[KEY].tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert left[KEY].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_without_error_feedback_nothing_is_kept_or_added() -> None:
    ones = {key: torch.ones_like(tensor) for key, tensor in SENT.items()}
    for settings in ({"codec": "int8"}, {"keep": 0.5}):
        arrived, left = answered(
            ones, {key: 100 * tensor for key, tensor in ones.items()}, error_feedback=False, **settings
        )
        assert left == {}
        assert float(arrived[KEY].max()) == 1.0


def test_a_fresh_adapter_is_the_clients_and_the_rounds_own_at_both_ends() -> None:
    drawn = {}
    for seed, client in ((9, "fr"), (9, "de"), (10, "fr")):
        written = wire.write(SETTINGS.model_copy(update={"derived_seed": seed}), COVERAGE, 2, {}, {})
        asked = REQUEST.model_copy(update={"client": client, "settings": written.settings})
        opened = wire.open_(asked, COVERAGE, written.content)
        answer, _ = wire.answer(asked, written.content, opened.start, 7, TOLD, {})
        received = wire.accept(answer, asked, written).change.received
        assert all(torch.equal(received[key], tensor) for key, tensor in opened.start.items())
        assert (set(opened.start), opened.frozen) == (set(SENT), set())
        drawn[seed, client] = opened.start["layers.1.mlp.up_proj.A"]
    one, *others = drawn.values()
    assert not any(torch.equal(one, other) for other in others)


def test_what_is_said_of_a_broken_message_is_short_and_plain() -> None:
    for content in (with_header(**{"\x1b]0;" + "n" * 60_000: one(dtype="?")}), reply(client="d" * 50_000)):
        with pytest.raises(LegolmError) as caught:
            wire.accept(content, REQUEST, GIVEN)
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


def test_requests_of_what_cannot_be_are_refused() -> None:
    session = {"run": "r", "round": 1, "k": 3, "targets": None, "rank": 1, "frozen_side": True}
    two = {
        "session": session,
        "there": ["a", "b"],
        "senders": ["a"],
        "sizes": [49, 49],
        "alike": {"atoms": [], "blocks": {}},
    }
    for changes, says in (({"rank": 0}, "rank: "), ({"secure": two}, "2 sizes of what 1 senders sealed")):
        header = REQUEST.model_dump(mode="json") | changes
        content = save({}, metadata={"legolm": json.dumps(header)})
        with pytest.raises(LegolmError, match=says):
            wire.unpack(content, wire.TrainRequest)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory": 10**400}, "memory"),  # more than a float holds, when it is told
        ({"bytes": -1}, "bytes"),
        ({"tokens": 10**30}, "tokens"),
    ],
)
def test_offers_of_what_cannot_be_are_refused(changes: dict[str, int], says: str) -> None:
    offer = {"name": "a", "id": 32 * "0", "parameters": 1, "bytes": 1, "memory": 1, "operations": 1.0, "tokens": 1}
    header = {"kind": "offer", "run": "r", "client": "fr", "precision": "fp32", "deadline_s": None}
    content = save({}, metadata={"legolm": json.dumps(header | {"offers": [offer | changes]})})
    with pytest.raises(LegolmError, match=f"offers.0.{says}"):
        wire.unpack(content, wire.OfferRequest)


def test_a_welcome_that_is_none_is_refused_in_one_line() -> None:
    data = {"rows": {}, "validation": 0.1, "test": 0.2, "limits": [1, None, 1], "system": None, "part": "a", "seed": 1}
    told = {"run": 16 * "0", "client": "fr", "block": "b", "files": [], "data": data}
    assert wire.read_welcome(json.dumps(told)).data.config.limit_train == 1
    for changes, says in (
        ({"a\nb\x1b[2J": 1}, "the server's welcome: a b"),
        ({"data": data | {"limits": [-1, None, None]}}, "data.limits.0"),
        ({"data": data | {"limits": [10**30, None, None]}}, "`limit_train` is larger than any number"),
    ):
        with pytest.raises(LegolmError, match=says) as error:
            wire.read_welcome(json.dumps(told | changes))
        assert str(error.value).isprintable()
