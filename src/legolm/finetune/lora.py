"""LoRA (Hu et al., arXiv 2106.09685) on a block, and merging it.

A block keeps its sparsity: it trains and merges M ∘ (W + s·B·A), M the block's mask of kept weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

from legolm.adapter import Tensors, factor_key, linears
from legolm.block import Coverage
from legolm.config import Precision
from legolm.finetune.kernels import Joint, LoraLinear
from legolm.finetune.masked import MaskedLinear
from legolm.models import decoder_layers, dtype_of
from legolm.system import trim

_Layer = tuple[nn.Linear, Tensor, Tensor]
"""With its A and B."""


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
    joined: list[_Adapted] = []
    # What a forward pass that failed has left holds all that it had come to.
    anew = model.get_decoder().register_forward_pre_hook(lambda *_: _forget(joined))
    patched = [one for layer in decoder_layers(model) for one in layer.modules() if isinstance(one, nn.Linear)]
    try:
        reading: dict[tuple[int, str, str], list[_Layer]] = {}
        for seed, (layer, module, linear) in enumerate(linears(model, coverage, factors)):
            a, b = (parameters[factor_key(layer, module, side)] for side in "AB")
            mask = coverage.mask(layer, module)
            if mask is None:
                part, _, _ = module.rpartition(".")
                reading.setdefault((layer, part, coverage.shape.module(module).cols), []).append((linear, a, b))
            else:
                linear.forward = _Masked(linear, dtype, a, b, scale, mask, seed)
        for alike in reading.values():
            adapted = _Adapted(alike, dtype, scale, dropout)
            joined.append(adapted)
            for place, (linear, _, _) in enumerate(alike):
                linear.forward = partial(adapted, place)  # type: ignore[method-assign]
        for linear in patched:
            if "forward" not in linear.__dict__:
                linear.forward = _Frozen(linear, dtype)  # type: ignore[assignment]
        trim()  # the weights moved into wider matrices: their old places lie scattered between these
        yield {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    finally:
        anew.remove()
        for linear in patched:
            linear.__dict__.pop("forward", None)
        for linear in patched:  # only then, for it takes memory
            linear.weight.data = linear.weight.data.contiguous()


class _Frozen:
    """A linear layer's forward in the dtype of matrix products."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        self._weight = linear.weight.detach().to(dtype)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear_function(x.to(self._weight.dtype), self._weight, self._bias)


class _Adapted:
    """Layers that read the same x, with their factors A and B: whichever is asked first computes for all."""

    def __init__(self, alike: Sequence[_Layer], dtype: torch.dtype, scale: float, dropout: float) -> None:
        layers = [linear for linear, _, _ in alike]
        joint = Joint([linear.weight.detach() for linear in layers], [len(a) for _, a, _ in alike], dtype)
        biases = [
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach()
            for linear in layers
        ]
        bias = None if all(linear.bias is None for linear in layers) else torch.cat(biases).to(dtype)
        for linear, weight in zip(layers, joint.weights, strict=True):
            if linear.weight.dtype == dtype:
                linear.weight.data = weight  # one copy in memory
        self._given = joint, bias, scale, dropout
        self._factors = [*(a for _, a, _ in alike), *(b for _, _, b in alike)]
        self._x: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def __call__(self, place: int, x: Tensor) -> Tensor:
        if x is not self._x or place not in self._left:
            found = LoraLinear.apply(x, *self._given, *self._factors)  # type: ignore[no-untyped-call]
            self._x, self._left = x, dict(enumerate(found))
        y = self._left.pop(place)
        if not self._left:
            self._x = None
        return y

    def forget(self) -> None:
        """Let go of what was computed and not asked for."""
        self._x, self._left = None, {}


def _forget(joined: Sequence[_Adapted]) -> None:
    for one in joined:
        one.forget()


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
