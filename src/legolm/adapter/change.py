"""What a client learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from legolm.adapter.keys import Tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What a client returns after training: the change `delta` of each factor it received, in its block's slice.

    `examples` is HeteAgg's weight n_k: the number of examples the client trained on. `received` is what
    the change is from: the factors after the codec, with those that the client made itself.
    """

    run: str
    round: int
    client: str
    block: str
    base_fingerprint: str
    coverage_hash: str
    received_hash: str
    examples: float
    rank: int
    scale: float
    delta: Mapping[str, Tensor]
    received: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalAdapter:
    """The aggregated adapter in the LLM's coordinates.

    `weight` has the keys and shapes of `factors` and holds, entry by entry, the total weight of the clients that
    ever trained it, so that "nobody trained this" (0) and "averaged to zero" differ.
    """

    factors: Tensors
    weight: Tensors
    rank: int
    scale: float
