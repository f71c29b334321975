"""Run the decoder layer by layer on calibration tokens and sum what pruning needs to know of each linear input."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from legolm.config import Precision
from legolm.finetune import autocast
from legolm.memory import available_bytes
from legolm.models import LayeredModel, Module, family_of
from legolm.models.family import Family
from legolm.types import LegolmError

Needs = Literal["nothing", "diagonal", "full"]
CHUNK = 4
"""Samples a forward pass: small enough for a laptop's memory, large enough to keep the matrix units busy."""
STRIP = 256
SPILL_SHARE = 8
"""Hidden states that take more than this part of the free memory go to disk."""


class Moments:
    """Second moments of a linear layer's input: sums over tokens of x² (`diagonal`) or x xᵀ (`full`), float32.

    Sums add up: those of several clients are those of their pooled data.
    """

    def __init__(self, features: int, needs: Needs) -> None:
        self.tokens = 0
        self._sum = torch.zeros(features if needs == "diagonal" else (features, features))

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., features)."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        if self._sum.dim() == 1:
            self._sum += x.square().sum(0)
            return
        # The layers may run in bfloat16; these sums may not: H would not even be positive definite.
        # x xᵀ is symmetric: strips from the diagonal down are little more than half of the work.
        with autocast("fp32"):
            for start in range(0, x.shape[1], STRIP):
                strip = slice(start, start + STRIP)
                self._sum[start:, strip].addmm_(x[:, start:].T, x[:, strip])

    def absorb(self, other: Moments) -> None:
        """Add another's sums."""
        self.tokens += other.tokens
        self._sum += other._sum

    def packed(self) -> Tensor:
        """The sums in one dimension: of x xᵀ the lower triangle, row by row."""
        return self._sum.clone() if self._sum.dim() == 1 else self._sum[_lower(len(self._sum))]

    @staticmethod
    def unpacked(sums: Tensor, tokens: int, features: int, needs: Needs) -> Moments:
        """What `packed` gave. Raises `ValueError` when it does not fit or is not finite."""
        found = Moments(features, needs)
        count = features if needs == "diagonal" else features * (features + 1) // 2
        if sums.shape != (count,) or sums.dtype != torch.float32 or not bool(sums.isfinite().all()) or tokens < 1:
            raise ValueError(f"sums of shape {tuple(sums.shape)} for {features} features, {tokens} tokens")
        found.tokens = tokens
        if needs == "diagonal":
            found._sum.copy_(sums)
        else:
            found._sum[_lower(features)] = sums
        return found

    @property
    def sum(self) -> Tensor:
        """Σ x² (features,) or Σ x xᵀ (features, features)."""
        return self._sum if self._sum.dim() == 1 else self._sum.tril() + self._sum.tril(-1).T

    @property
    def mean_square(self) -> Tensor:
        """E[x²] of each feature."""
        return (self._sum if self._sum.dim() == 1 else self._sum.diagonal()) / max(self.tokens, 1)


class Regression:
    """Sums to fit a linear layer by: x xᵀ of its inputs (in, in), y xᵀ of what it should give (out, in); float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.moments = Moments(linear.in_features, "full")
        self.cross = torch.zeros(linear.out_features, linear.in_features)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs (..., in) and wanted outputs (..., out)."""
        self.moments.add(inputs)
        with autocast("fp32"):
            self.cross.addmm_(outputs.flatten(0, -2).float().T, inputs.flatten(0, -2).float())


class Source(Protocol):
    """What a cut asks of the calibration, layer by layer; `layer` is the block's own, as far as it is cut."""

    def moments(self, index: int, layer: nn.Module, needs: Needs) -> Mapping[str, Moments]:
        """Moments of the inputs of all the layer's linear layers."""

    def regression(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None) -> Regression:
        """What the linear layer `name` should answer: as it does, or for the layer to give `wanted`."""

    def advance(self, index: int, layer: nn.Module) -> None:
        """Go on to the next layer with what this one sends."""


class Stream:
    """Hidden states (samples, length, hidden; float32) of all calibration samples between two decoder layers."""

    def __init__(
        self, hidden: Tensor, arguments: dict[int, list[dict[str, Any]]], family: Family, precision: Precision
    ) -> None:
        self.hidden = hidden
        self._arguments, self._family = arguments, family
        self._precision: Precision = precision

    @staticmethod
    def start(model: LayeredModel, tokens: Tensor, precision: Precision) -> Stream:
        """What the first decoder layer receives for token ids (samples, length)."""
        hidden = _buffer((*tokens.shape, model.config.hidden_size))
        arguments: dict[int, list[dict[str, Any]]] = {}
        with model.rest() as decoder:
            for part in _parts(len(tokens)):
                # Chunks of one size have the same masks and positions.
                recorded: list[dict[str, Any]] = []
                with _record(model.layers, recorded) as seen:
                    decoder(input_ids=tokens[part], use_cache=False)
                hidden[part] = seen[0]
                arguments.setdefault(len(seen[0]), recorded)
        return Stream(hidden, arguments, family_of(model.config), precision)

    def fork(self) -> Stream:
        """Another stream from here, which another cut goes on with."""
        return Stream(_buffer(self.hidden.shape).copy_(self.hidden), self._arguments, self._family, self._precision)

    def run(self, index: int, layer: nn.Module) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(samples, input, output) of one decoder layer for each chunk, without moving on."""
        with torch.no_grad(), autocast(self._precision):
            for part in _parts(len(self.hidden)):
                hidden = self.hidden[part]
                yield part, hidden, layer(hidden, **self._arguments[len(hidden)][index])

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the layer's outputs. Raises `LegolmError` when they are not finite."""
        for part, _, output in self.run(index, layer):
            if not bool(output.isfinite().all()):
                raise LegolmError(
                    f"calibration: layer {index} gives values that are not finite; check the model's weights"
                )
            self.hidden[part] = output

    def regression(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None) -> Regression:
        """How the matrix that ends attention or MLP should answer: as it does, or for the layer to give `wanted`.

        Its bias stays. Where an RMS norm follows (Gemma 3, OLMo 2), errors count as they arrive in the residual
        stream: each token by the size that the norm divides by, and corrected through the norm's gain.
        """
        module = self._family.modules[name]
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        norm = nn.Identity() if module.norm is None else layer.get_submodule(module.norm)
        gain = norm(torch.ones(linear.out_features))
        # A small gain would blow an error up, and the norm share it out over all channels: those take a part only.
        through = gain / gain.square().clamp(min=gain.square().mean())
        found = Regression(linear)
        seen: dict[str, Tensor] = {}
        hook = linear.register_forward_hook(lambda _module, inputs, output: seen.update(x=inputs[0], y=output))
        try:
            for part, _, output in self.run(index, layer):
                inputs, answer = seen["x"], seen["y"].float()
                added = norm(answer)
                error = torch.zeros(()) if wanted is None else wanted[part] - output
                size = (answer * gain).norm(dim=-1, keepdim=True) / added.norm(dim=-1, keepdim=True)
                size = size.nan_to_num(1.0)  # a token that answers nothing
                if linear.bias is not None:
                    answer = answer - linear.bias
                found.add(inputs / size, answer / size + error * through)
        finally:
            hook.remove()
        return found

    def moments(self, index: int, layer: nn.Module, needs: Needs) -> dict[str, Moments]:
        """Moments of the inputs of all the layer's linear layers; those that share an input share the object."""
        shared: dict[str, Moments] = {}
        hooks = []
        for group in inputs_of(self._family.modules):
            linear = layer.get_submodule(group[0])
            assert isinstance(linear, nn.Linear)
            found = Moments(linear.in_features, needs)
            shared |= dict.fromkeys(group, found)
            hooks.append(linear.register_forward_pre_hook(_adder(found)))
        try:
            for _ in self.run(index, layer):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return shared


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _adder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: moments.add(inputs[0])


def inputs_of(modules: Mapping[str, Module]) -> list[list[str]]:
    """Group modules that read the same tensor: q, k, v; gate, up."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((name.rpartition(".")[0], module.cols), []).append(name)
    return list(groups.values())


def _parts(samples: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK)]


def _buffer(shape: Sequence[int]) -> Tensor:
    """Room for hidden states: in memory, or in a file that vanishes with it when memory is short."""
    sizes = tuple(shape)
    count = math.prod(sizes)
    if 4 * count * SPILL_SHARE <= available_bytes():
        return torch.empty(sizes)
    with tempfile.NamedTemporaryFile(prefix="legolm-", suffix=".hidden") as file:
        return torch.from_file(file.name, shared=True, size=count).view(sizes)


@contextmanager
def _record(layers: nn.ModuleList, arguments: list[dict[str, Any]]) -> Iterator[list[Tensor]]:
    """Let each layer record its keyword arguments (masks, positions) and pass its input on; yields those inputs."""
    seen: list[Tensor] = []

    def recorder(hidden: Tensor, **kwargs: Any) -> Tensor:
        seen.append(hidden)
        arguments.append(kwargs)
        return hidden

    for layer in layers:
        layer.forward = recorder
    try:
        with torch.no_grad():
            yield seen
    finally:
        for layer in layers:
            del layer.forward
