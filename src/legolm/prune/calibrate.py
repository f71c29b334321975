"""Run the decoder layer by layer on calibration tokens and sum what pruning needs to know of each linear input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from legolm.config import Precision
from legolm.finetune import autocast
from legolm.models import Module, decoder_layers, family_of
from legolm.types import LegolmError

Needs = Literal["nothing", "diagonal", "full"]
CHUNK = 4
"""Samples a forward pass: small enough for a laptop's memory, large enough to keep the matrix units busy."""


class Moments:
    """Second moments of a linear layer's input: sums over tokens of x² (`diagonal`) or x xᵀ (`full`), float32."""

    def __init__(self, features: int, needs: Needs) -> None:
        self.tokens = 0
        self.sum = torch.zeros(features if needs == "diagonal" else (features, features))

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., features)."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        # The layers may run in bfloat16; these sums may not: H would not even be positive definite.
        with autocast("fp32"):
            self.sum += x.square().sum(0) if self.sum.dim() == 1 else x.T @ x

    @property
    def mean_square(self) -> Tensor:
        """E[x²] of each feature."""
        return (self.sum if self.sum.dim() == 1 else self.sum.diagonal()) / max(self.tokens, 1)


class Regression:
    """Sums to fit a linear layer by: x xᵀ of its inputs (in, in), y xᵀ of what it should give (out, in); float32."""

    def __init__(self, linear: nn.Linear) -> None:
        self.moments = Moments(linear.in_features, "full")
        self.cross = torch.zeros(linear.out_features, linear.in_features)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs (..., in) and wanted outputs (..., out)."""
        self.moments.add(inputs)
        with autocast("fp32"):
            self.cross += outputs.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()


class Stream:
    """Hidden states of all calibration samples between two decoder layers, in chunks of (CHUNK, length, hidden)."""

    def __init__(self, model: Any, tokens: Tensor, precision: Precision) -> None:
        self._precision: Precision = precision
        self._layers = decoder_layers(model)
        self._family = family_of(model.config)
        self._hidden: list[Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []
        for chunk in torch.split(tokens, CHUNK):
            arguments: list[dict[str, Any]] = []
            with _record(self._layers, arguments):
                self._hidden.append(_first(self._layers, model, chunk))
            self._arguments.append(arguments)

    def run(self, index: int, layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(input, output) of one decoder layer for each chunk, without moving on."""
        with torch.no_grad(), autocast(self._precision):
            for hidden, arguments in zip(self._hidden, self._arguments, strict=True):
                yield hidden, layer(hidden, **arguments[index])

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the layer's outputs. Raises `LegolmError` when they are not finite."""
        self._hidden = [output for _, output in self.run(index, layer)]
        if not all(bool(hidden.isfinite().all()) for hidden in self._hidden):
            raise LegolmError(f"calibration: layer {index} gives values that are not finite; check the model's weights")

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states, chunk by chunk."""
        return self._hidden

    def middle(self, index: int, layer: nn.Module) -> list[Tensor]:
        """The hidden states between attention and MLP of one decoder layer, chunk by chunk."""
        assert self._family.middle is not None
        seen: list[Tensor] = []
        reader = layer.get_submodule(self._family.middle)
        hook = reader.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            for _ in self.run(index, layer):
                pass
        finally:
            hook.remove()
        return seen

    def regression(self, index: int, layer: nn.Module, name: str, wanted: Iterable[Tensor]) -> Regression:
        """How the matrix that ends attention or MLP should answer for the hidden states after it to be `wanted`.

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
            for (hidden, output), want in zip(self.run(index, layer), wanted, strict=True):
                inputs, answer = seen["x"], seen["y"].float()
                added = norm(answer)
                error = want - (hidden + added if module.cols == "query" else output)
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
        for group in _by_input(self._family.modules):
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


def _adder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: moments.add(inputs[0])


def _by_input(modules: Mapping[str, Module]) -> list[list[str]]:
    """Group modules that read the same tensor: q, k, v; gate, up."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((name.rpartition(".")[0], module.cols), []).append(name)
    return list(groups.values())


@contextmanager
def _record(layers: nn.ModuleList, arguments: list[dict[str, Any]]) -> Iterator[None]:
    """For one forward pass, let each layer record its keyword arguments (masks, positions) and pass its input on."""

    def recorder(hidden: Tensor, **kwargs: Any) -> Tensor:
        arguments.append(kwargs)
        return hidden

    for layer in layers:
        layer.forward = recorder
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _first(layers: nn.ModuleList, model: Any, chunk: Tensor) -> Tensor:
    """What the first decoder layer receives for a chunk of token ids."""
    seen: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=chunk, use_cache=False)
    finally:
        hook.remove()
    return seen[0]
