"""What an aggregation scheme is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from legolm.config import AggregateConfig
from legolm.coverage import Coverage
from legolm.types import GlobalAdapter, Tensors, Update


class Scheme(Protocol):
    """Adds updates as they arrive; order does not matter beyond rounding. Knows tensors and coverage, no transport."""

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """What a client of this coverage and rank receives."""

    def add(self, update: Update, coverage: Coverage) -> None:
        """Add one checked update of a block with this coverage."""

    def finish(self) -> GlobalAdapter:
        """End the round: the new global adapter. Without any update it is the old one."""

    def state(self) -> Tensors:
        """All that the next round needs, between rounds."""

    def load_state(self, state: Tensors) -> None:
        """Go on from a saved state."""


Make = Callable[[GlobalAdapter, AggregateConfig], Scheme]
SCHEMES: dict[str, Make] = {}


def scheme(name: str) -> Callable[[Make], Make]:
    """Register a scheme under the name that configs use."""

    def register(make: Make) -> Make:
        SCHEMES[name] = make
        return make

    return register


def make_scheme(start: GlobalAdapter, config: AggregateConfig) -> Scheme:
    """The configured scheme, at the start of a run."""
    return SCHEMES[config.scheme](start, config)
