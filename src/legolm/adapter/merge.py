"""Merging an adapter into its block, under the block's mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from legolm.adapter.keys import Tensors, factor_key, parse_key
from legolm.block import Coverage
from legolm.models import decoder_layers, rounded


def merge(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> None:
    """Merge an adapter into the block in place: W ← M ∘ (W + s·B·A), rounded as the masked forward rounds it."""
    for seed, (layer, module, linear) in enumerate(linears(model, coverage, factors)):
        old = linear.weight.data
        a, b = (factors[factor_key(layer, module, side)].to(old.device) for side in "AB")
        mask = coverage.mask(layer, module)
        mask = None if mask is None else mask.to(old.device)
        linear.weight.data = merged_weight(old, a, b, scale, mask, seed)


@contextmanager
def merged(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> Iterator[Any]:
    """The block as it would be deployed with this adapter; afterwards it is as it was, bit for bit."""
    before = [(linear, linear.weight.data) for _, _, linear in linears(model, coverage, factors)]
    try:
        merge(model, coverage, factors, scale)
        yield model
    finally:
        for linear, weight in before:
            linear.weight.data = weight


def linears(model: Any, coverage: Coverage, factors: Tensors) -> Iterator[tuple[int, str, Any]]:
    """(LLM layer, module, linear layer) of all that an adapter touches."""
    touched = sorted({parse_key(key)[:2] for key in factors})
    layers = dict(zip(coverage.layers, decoder_layers(model), strict=True))
    for layer, module in touched:
        yield layer, module, layers[layer].get_submodule(module)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, mask: Tensor | None, seed: int) -> Tensor:
    """M ∘ (W + s·B·A), without a mask W + s·B·A, rounded once to the dtype of W; the seed decides how (`rounded`)."""
    merged = weight.to(torch.float32, copy=True).addmm_(b.detach(), a.detach(), alpha=scale)
    return rounded(merged if mask is None else masked_(merged, mask), weight.dtype, seed)


def masked_(matrix: Tensor, mask: Tensor) -> Tensor:
    """M ∘ a float32 matrix, in place, for a bool mask M."""
    return matrix.mul_(mask.view(torch.uint8).float())  # torch turns bytes into floats at once, bools one by one
