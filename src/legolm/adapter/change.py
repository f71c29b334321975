"""What a client learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from legolm.adapter.keys import Tensors


@dataclass(frozen=True)
class Change:
    """The difference `delta` of each trained factor from what the client received, in its block's slice (float32).

    `received` is what the change is from: the factors after the codec, with those that the client made itself.
    `examples` is the client's weight n_k, the number of examples that it trained on; `rank` its LoRA rank.
    """

    delta: Mapping[str, Tensor]
    received: Tensors
    examples: float
    rank: int

    @property
    def modules(self) -> list[str]:
        """`layers.{LLM layer}.{module}` of all that changed, in order."""
        return sorted({key.rpartition(".")[0] for key in self.delta})

    def ended(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of such a module as the client ended with them, where both train."""
        a, b = (self.received[f"{module}.{side}"] + self.delta[f"{module}.{side}"] for side in "AB")
        return a, b
