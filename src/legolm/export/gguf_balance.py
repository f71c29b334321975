"""Channels of like size in GGUF files: what large activations give up, the columns that read them take.

llama.cpp rounds activations as it rounds weights, 32 together by the largest of them, so that one large channel costs
its neighbours their bits. A norm's weights, and the rows of an MLP's `up`, may be divided by what the columns of the
matrices behind them are multiplied by: the same function, and zeros stay zeros. SmoothQuant (2211.10438) with α = 1/2,
means in place of largest values: with activations of size x and columns of size w both become √(x w).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from legolm.data import help_tokens
from legolm.export.gguf_layout import Layout
from legolm.models import decoder_layers

READ_BY = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "ffn_up": ("ffn_down",),
}
"""What may give up, and whose columns take, in llama.cpp's names; `ffn_up` where a gate multiplies what it gives."""
GIVER = {taker: giver for giver, takers in READ_BY.items() for taker in takers}
TOKENS = 512
"""Of Python's help, that activations are measured on."""
FLOOR = 1e-3
"""Of the mean size: channels below it are taken to be of it."""


@dataclass(frozen=True)
class Balance:
    """Scales of channels (n,), by what gives them up as the file names it (`blk.0.ffn_norm`); none of what stays."""

    scales: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the file, balanced: a matrix, a bias or a norm's weights."""
        return self.columns(name, self.rows(name, tensor)) if self.scales else tensor

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A weight's rows or a bias, less what they give up; also B of an adapter."""
        scale = self.scales.get(name.rpartition(".")[0])
        return tensor if scale is None else tensor / (scale[:, None] if tensor.dim() == 2 else scale)

    def columns(self, name: str, tensor: Tensor) -> Tensor:
        """A weight's columns with what they take; also A of an adapter."""
        module, _, kind = name.rpartition(".")
        block, _, part = module.rpartition(".")
        scale = self.scales.get(f"{block}.{GIVER.get(part)}")
        return tensor if scale is None or kind != "weight" else tensor * scale


def balance_of(model: Any, tokenizer: Any, layout: Layout) -> Balance:
    """Of a model in float32, from its activations on a short text."""
    activations: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    lengths: dict[str, int] = {}

    def measure(names: list[str], _module: Any, given: tuple[Tensor, ...]) -> None:
        activations.update(dict.fromkeys(names, given[0].flatten(0, -2).abs().mean(0)))

    hooks = []
    for index, layer in enumerate(decoder_layers(model)):
        prefix = f"{layout.shape.entry.layers}.{index}."
        for name, parameter in layer.named_parameters():
            parts = dict(layout.tensors(prefix + name, parameter.data))
            squares |= {part: value.square().sum(0) for part, value in parts.items()}
            lengths |= {part: len(value) for part, value in parts.items()}
            module = name.removesuffix(".weight")
            if module in layout.shape.modules:
                hook: Callable[..., None] = partial(measure, list(parts))
                hooks.append(layer.get_submodule(module).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor([help_tokens(tokenizer, min(TOKENS, layout.context))]), use_cache=False)
    for handle in hooks:
        handle.remove()
    scales = {}
    for block in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in squares):
        for giver, takers in READ_BY.items():
            found = [name for taker in takers if (name := f"{block}.{taker}.weight") in squares]
            gated = giver != "ffn_up" or f"{block}.ffn_gate.weight" in squares
            if found and gated and f"{block}.{giver}.weight" in squares:
                mean = torch.stack([squares[name] for name in found]).sum(0) / sum(lengths[name] for name in found)
                scales[f"{block}.{giver}"] = (_sizes(activations[found[0]]) / _sizes(mean.sqrt())).sqrt()
    return Balance(scales)


def _sizes(channels: Tensor) -> Tensor:
    return channels.clamp(min=max(FLOOR * float(channels.mean()), 1e-12))
