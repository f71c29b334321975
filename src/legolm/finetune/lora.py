"""LoRA (Hu et al., arXiv 2106.09685) on a block, and merging it.

A block keeps its sparsity: it trains and merges M ∘ (W + s·B·A), M the block's mask of kept weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

from legolm.config import Precision
from legolm.coverage import Coverage, factor_key, parse_key
from legolm.finetune.kernels import LoraLinear
from legolm.finetune.masked import MaskedLinear, merged_weight
from legolm.finetune.precision import dtype_of
from legolm.memory import trim
from legolm.models import decoder_layers
from legolm.types import Tensors


@contextmanager
def lora(
    model: Any,
    coverage: Coverage,
    factors: Tensors,
    scale: float,
    precision: Precision = "fp32",
    frozen: Collection[str] = (),
    dropout: float = 0.0,
) -> Iterator[dict[str, nn.Parameter]]:
    """Put an adapter on the block for as long as the context lasts; afterwards the model is as it was.

    Yields the factors that train (all but `frozen`) by factor key, float32. Matrix products of the decoder layers run
    in `precision`. `dropout` is on the input of A; a masked module has one matrix and no such input, and goes without.
    """
    dtype = dtype_of(precision)
    # Sorted: files and messages give factors in any order, and sums over them (the gradient's norm) round by it.
    parameters = {
        key: nn.Parameter(tensor.to(model.device, torch.float32, copy=True), requires_grad=key not in frozen)
        for key, tensor in sorted(factors.items())
    }
    patched = [one for layer in decoder_layers(model) for one in layer.modules() if isinstance(one, nn.Linear)]
    try:
        for linear in patched:
            linear.forward = _Frozen(linear, dtype)  # type: ignore[assignment]
        for seed, (layer, module, linear) in enumerate(_linears(model, coverage, factors)):
            a, b = (parameters[factor_key(layer, module, side)] for side in "AB")
            mask = coverage.mask(layer, module)
            if mask is None:
                linear.forward = _Adapted(linear, dtype, a, b, scale, dropout)
            else:
                linear.forward = _Masked(linear, dtype, a, b, scale, mask, seed)
        trim()  # the weights moved into wider matrices: their old places lie scattered between these
        yield {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    finally:
        for linear in patched:
            linear.__dict__.pop("forward", None)
            linear.weight.data = linear.weight.data.contiguous()


class _Frozen:
    """A linear layer's forward in the dtype of matrix products."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        self._weight = linear.weight.detach().to(dtype)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear_function(x.to(self._weight.dtype), self._weight, self._bias)


class _Adapted(_Frozen):
    """The same with factors A and B."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> None:
        super().__init__(linear, dtype)
        self._given = a, b, scale, dropout
        rows, columns = linear.weight.shape
        self._joint = torch.zeros(rows + len(a), columns + len(a), dtype=dtype, device=a.device)
        self._joint[:rows, :columns] = self._weight
        self._weight = self._joint[:rows, :columns]
        if linear.weight.dtype == dtype:
            linear.weight.data = self._weight  # one copy in memory

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = LoraLinear.apply(x, self._joint, self._bias, *self._given)  # type: ignore[no-untyped-call]
        return y


class _Masked(_Frozen):
    """The same under the block's mask."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, a: Tensor, b: Tensor, scale: float, mask: Tensor, seed: int
    ) -> None:
        super().__init__(linear, dtype)
        self._given = a, b, mask.to(a.device), scale, seed

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = MaskedLinear.apply(x, self._weight, self._bias, *self._given)  # type: ignore[no-untyped-call]
        return y


def merge(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> None:
    """Merge an adapter into the block in place: W ← M ∘ (W + s·B·A), rounded as the masked forward rounds it."""
    for seed, (layer, module, linear) in enumerate(_linears(model, coverage, factors)):
        old = linear.weight.data
        a, b = (factors[factor_key(layer, module, side)].to(old.device) for side in "AB")
        mask = coverage.mask(layer, module)
        mask = None if mask is None else mask.to(old.device)
        linear.weight.data = merged_weight(old, a, b, scale, mask, seed)


@contextmanager
def merged(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> Iterator[Any]:
    """The block as it would be deployed with this adapter; afterwards it is as it was, bit for bit."""
    before = [(linear, linear.weight.data) for _, _, linear in _linears(model, coverage, factors)]
    merge(model, coverage, factors, scale)
    try:
        yield model
    finally:
        for linear, weight in before:
            linear.weight.data = weight


def _linears(model: Any, coverage: Coverage, factors: Tensors) -> Iterator[tuple[int, str, Any]]:
    """(LLM layer, module, linear layer) of all that an adapter touches."""
    touched = sorted({parse_key(key)[:2] for key in factors})
    layers = dict(zip(coverage.layers, decoder_layers(model), strict=True))
    for layer, module in touched:
        yield layer, module, layers[layer].get_submodule(module)
