"""How a decoder calls its layers: recorded once, and made again with other hidden states or another layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What a layer got beside its hidden states: masks, positions."""

    others: tuple[Any, ...]
    named: dict[str, Any]

    def again(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What a layer gives for these hidden states."""
        output: Tensor = layer(hidden, *self.others, **self.named)
        return output


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """Let each layer record its call and pass its input on. Yields those inputs and the calls."""
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def recorder(hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        inputs.append(hidden)
        calls.append(Call(others, named))
        return hidden

    for layer in layers:
        layer.forward = recorder
    try:
        with torch.no_grad():
            yield inputs, calls
    finally:
        for layer in layers:
            del layer.forward
