"""A structured block in the making, beside the dense model's own pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from legolm.models import LayeredModel, shape_of
from legolm.prune.calibrate import Stream
from legolm.prune.structured import StructuredCut


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A checkpoint of four layers."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, vocab_size=100, **heads)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "four")
    return tmp_path / "four"


@pytest.mark.parametrize(
    ("kept", "groups", "runs"),
    [
        ((0, 1, 3), 2, [1, 3]),  # 1 makes up for 2
        ((0, 1, 2), 2, [2]),
        ((1, 2, 3), 2, [1, 2, 3]),
        ((0, 1, 2, 3), 1, [0, 1, 2, 3]),
    ],
)
def test_up_to_the_first_dropped_layer_the_dense_pass_is_the_blocks(
    kept: tuple[int, ...], groups: int, runs: list[int], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Stream, int]] = []
    run, advance = Stream.run, Stream.advance

    def noted(stream: Stream, index: int, *layer: Any) -> Any:
        ran.append((stream, index))
        return run(stream, index, *layer)

    def cut() -> tuple[Stream, list[dict[str, Tensor]]]:
        model = LayeredModel(four)
        shape = shape_of(model.config)
        dense = Stream.start(model, torch.arange(100).view(5, 20), "fp32")
        own = dense.fork()
        one = StructuredCut(shape, replace(shape, layers=len(kept), kv_groups=groups), kept, model.config, own)
        made = []
        for index in range(4):
            with model.layer(index) as layer:
                dense.advance(index, layer)
                if (ready := one.step(index, layer, dense)) is not None:
                    made.append({name: tensor.clone() for name, tensor in ready.state_dict().items()})
        return own, made

    monkeypatch.setattr(Stream, "run", noted)
    own, made = cut()
    assert [index for stream, index in ran if stream is own] == runs
    monkeypatch.setattr(Stream, "advance", lambda stream, index, layer, *_same: advance(stream, index, layer))
    again, wanted = cut()
    assert torch.equal(own.hidden, again.hidden)
    assert len(made) == len(wanted) == len(kept)
    assert all(
        torch.equal(tensor, other[name])
        for one, other in zip(made, wanted, strict=True)
        for name, tensor in one.items()
    )
