"""Codecs: what arrives, what is lost, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.adapter import Tensors
from legolm.errors import LegolmError
from legolm.federate.wire import codec

SHAPES = {"layers.0.mlp.up_proj.A": (2, 6), "layers.0.mlp.up_proj.B": (5, 2), "layers.1.mlp.down_proj.A": (2, 3)}
LAYOUT = codec.Layout(SHAPES)


def factors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def test_int8_by_hand() -> None:
    key = "layers.0.mlp.up_proj.A"
    sent = codec.encode({key: torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]])}, "int8")
    assert sent["factors"].tolist() == [127, -64, 0, 0, 0, 0]
    assert sent["scales"].tolist() == [1.0, 0.0]
    arrived = codec.decode(sent, "int8", codec.Layout({key: (2, 3)}))
    assert arrived[key].tolist() == [[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["none", "bf16", "int8"])
@given(seed=st.integers(0, 99), keep=st.sampled_from([1.0, 0.5, 0.1]))
@settings(max_examples=20)
def test_what_arrives_is_near_and_the_rest_is_zero(name: codec.Codec, seed: int, keep: float) -> None:
    given_ = factors(seed)
    sent = codec.encode(given_, name, keep)
    arrived = codec.decode(sent, name, LAYOUT, keep)
    for key, tensor in given_.items():
        mask = codec.most_salient(tensor, keep)
        assert int(mask.sum()) == round(keep * tensor.numel())
        assert not arrived[key][~mask].any()
        largest = tensor.abs().amax(1 if key.endswith("A") else 0, keepdim=True)
        error = {"none": 0.0, "bf16": 2**-8, "int8": 0.5 / 127}[name]
        assert bool(((arrived[key] - tensor).abs() <= 1.001 * error * largest)[mask].all())
    assert sum(t.numel() * t.element_size() for t in sent.values()) == codec.encoded_bytes(LAYOUT, name, keep)


def test_error_feedback_delivers_everything_in_the_end() -> None:
    """The sum of what arrives follows the sum of what was meant, however coarse the steps."""
    residual = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    arrived = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    change = factors()
    for _ in range(50):
        meant = {key: change[key] + residual[key] for key in SHAPES}
        got = codec.decode(codec.encode(meant, "int8"), "int8", LAYOUT)
        for key in SHAPES:
            residual[key] = meant[key] - got[key]
            arrived[key] += got[key]
    for key in SHAPES:
        torch.testing.assert_close(arrived[key] / 50, change[key], rtol=0, atol=0.01 * float(change[key].abs().max()))


def test_most_salient_counts_and_ties() -> None:
    mask = codec.most_salient(torch.tensor([[3.0, -4.0], [1.0, 3.0]]), 0.5)
    assert mask.tolist() == [[True, True], [False, False]]
    assert int(codec.most_salient(torch.ones(10), 0.75).sum()) == 8


@pytest.mark.parametrize(
    ("name", "keep", "key", "value", "says"),
    [
        ("int8", 1.0, "scales", torch.ones(3), "scales has shape"),
        ("int8", 1.0, "scales", None, "scales is missing"),
        ("none", 0.5, "kept", torch.zeros(1, dtype=torch.uint8), "kept has shape"),
        ("none", 0.5, "factors", torch.ones(5), r"has shape \(5,\); the block's is \(14,\)"),
        ("bf16", 1.0, "factors", torch.ones(28), "must be bfloat16"),
        ("none", 1.0, "scales", torch.ones(1), "scales was not asked for"),
    ],
)
def test_what_does_not_fit(name: codec.Codec, keep: float, key: str, value: torch.Tensor | None, says: str) -> None:
    sent = codec.encode(factors(), name, keep)
    if value is None:
        del sent[key]
    else:
        sent[key] = value
    with pytest.raises(LegolmError, match=says):
        codec.decode(sent, name, LAYOUT, keep)
