"""Training a block's linear weights themselves, under its mask: no adapter in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

from legolm.block import Coverage
from legolm.config import Precision
from legolm.models import decoder_layers, dtype_of, rounded


@contextmanager
def whole(model: Any, coverage: Coverage, precision: Precision) -> Iterator[list[nn.Parameter]]:
    """Yield float32 parameters that stand for the decoder layers' linear weights; afterwards the model has them.

    Products run in `precision`. A pruned weight has no gradient and stays zero.
    """
    dtype = dtype_of(precision)
    trained: list[tuple[nn.Linear, nn.Parameter]] = []
    for index, layer in zip(coverage.layers, decoder_layers(model), strict=True):
        for module in coverage.shape.modules:
            linear = layer.get_submodule(module)
            assert isinstance(linear, nn.Linear)
            parameter = nn.Parameter(linear.weight.detach().to(torch.float32, copy=True))
            mask = coverage.mask(index, module)
            if mask is not None:
                parameter.register_hook(mask.to(parameter.device).mul)  # type: ignore[no-untyped-call]
            linear.forward = _Whole(parameter, linear.bias, dtype)  # type: ignore[assignment]
            trained.append((linear, parameter))
    try:
        yield [parameter for _, parameter in trained]
    finally:
        for seed, (linear, parameter) in enumerate(trained):
            del linear.forward
            linear.weight.data = rounded(parameter.detach(), linear.weight.dtype, seed)


class _Whole:
    """A linear layer's forward with a float32 weight and products in another dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype
        self._bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear_function(x.to(self._dtype), self._weight.to(self._dtype), self._bias)
