"""Schemes that keep one global adapter and make it anew at the end of a round: what they share, and what a round is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from legolm.adapter import Change, Tensors, slice_factors
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.block import Coverage


class Round(Protocol):
    """One round of a scheme."""

    def add(self, change: Change, coverage: Coverage) -> None:
        """Take one client's change."""

    def result(self, factors: Tensors) -> Tensors:
        """The factors (float32, by key) after the round, from those before it; without any change the same."""


class OneAdapter(Scheme):
    """The factors, and the round under way, which `make_round` begins from the start and the factors so far."""

    def __init__(
        self,
        make_round: Callable[[Start, Tensors], Round],
        unequal: Literal["no", "rank", "block"],
        dense: bool,
        streams: bool,
    ) -> None:
        self._make_round = make_round
        self.unequal, self.dense, self.streams = unequal, dense, streams

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        self._start = start
        self._factors = start.make() if state is None else factors_in(state)
        self._round = self._make_round(start, self._factors)

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the global adapter: its first `rank` rank rows."""
        return slice_factors(coverage, self._factors, rank)

    def add(self, change: Change, coverage: Coverage) -> None:
        """Add to the round."""
        self._round.add(change, coverage)

    def finish(self) -> None:
        """Take the round's result and begin another."""
        self._factors = self._round.result(self._factors)
        self._round = self._make_round(self._start, self._factors)

    def state(self) -> Tensors:
        """Factors by key."""
        return dict(self._factors)
