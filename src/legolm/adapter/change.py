"""What a client learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from legolm.adapter.keys import Tensors


@dataclass(frozen=True)
class Change:
    """The difference `delta` of each trained factor from what the client received, in its block's slice (float32).

    `received` is what the change is from: the factors after the codec, with those that the client made itself. `sent`
    is the same before the codec, as the server holds it, where that is another.
    `examples` is the client's weight n_k, for a scheme only what it counts (`aggregate.weight`): the number of examples
    that it trained on, or less; `rank` its LoRA rank.
    """

    delta: Mapping[str, Tensor]
    received: Tensors
    examples: float
    rank: int
    sent: Tensors = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """`layers.{LLM layer}.{module}` of all that changed, in order."""
        return sorted({key.rpartition(".")[0] for key in self.delta})

    def ended(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of such a module as the client ended with them, where both train.

        They count from what was sent: else whoever averages them would put the codec's rounding of the way down into
        the result, round after round.
        """
        before = self.sent or self.received
        a, b = (before[f"{module}.{side}"] + self.delta[f"{module}.{side}"] for side in "AB")
        return a, b
