"""What an aggregation scheme is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from legolm.adapter import GlobalAdapter, Tensors, Update
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape


@dataclass(frozen=True)
class Start:
    """Where a run starts: factors in the coordinates of an LLM of this shape; `seed` made those that nobody sends."""

    shape: Shape
    factors: Tensors
    rank: int
    scale: float
    seed: int = 0


class Scheme(ABC):
    """Adds updates as they arrive; order does not matter beyond rounding. Knows tensors and coverage, no transport.

    A client trains `payload` and, where `derived_seed` is given, the factors that it makes itself from that seed
    (`initial.initial_factors`); its base is the block plus every `fold` it got. `adapter` is all of that as one
    adapter: what a block or the LLM is scored and merged with.
    """

    streaming: ClassVar[bool] = True
    """A round's memory is the same for any number of clients."""
    unequal_shapes: ClassVar[Literal["no", "rank", "block"]] = "block"
    """What may differ between clients: nothing, the LoRA rank of dense clients, or the block."""
    dense: ClassVar[bool] = False
    """Works on clients that hold the whole LLM only."""
    folds: ClassVar[bool] = False
    """Rounds change the clients' base (`fold`)."""
    proximal: float = 0.0
    """FedProx's μ for the client's training."""
    derived_seed: int | None = None
    """Seed of the factors that are not sent; None: all are sent."""

    @abstractmethod
    def __init__(self, start: Start, config: AggregateConfig) -> None: ...

    @abstractmethod
    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The factors that a client of this coverage and rank receives, in its block's slice."""

    def fold(self, coverage: Coverage, since: int) -> Tensors:
        """The change of the base (factors A and B of any rank) that rounds after `since` made, in the block's slice."""
        return {}

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """What a block of this coverage is evaluated with; all modules share one rank, which may be another."""
        return self.payload(coverage, rank)

    @abstractmethod
    def add(self, update: Update, coverage: Coverage) -> None:
        """Add one checked update of a block with this coverage."""

    @abstractmethod
    def finish(self) -> GlobalAdapter:
        """End the round: the new global adapter. Without any update it is the old one."""

    @abstractmethod
    def state(self) -> Tensors:
        """All that the next round needs, between rounds."""

    @abstractmethod
    def load_state(self, state: Tensors) -> None:
        """Go on from a saved state."""


SCHEMES: dict[str, Callable[[AggregateConfig], type[Scheme]]] = {}
S = TypeVar("S", bound=type[Scheme])


def scheme(name: str) -> Callable[[S], S]:
    """Register a scheme under the name that configs use."""

    def register(kind: S) -> S:
        SCHEMES[name] = lambda config: kind
        return kind

    return register


def scheme_class(config: AggregateConfig) -> type[Scheme]:
    """The configured scheme with its flags."""
    return SCHEMES[config.scheme](config)


def make_scheme(start: Start, config: AggregateConfig) -> Scheme:
    """The configured scheme at the start of a run."""
    return scheme_class(config)(start, config)
