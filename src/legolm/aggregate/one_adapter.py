"""Schemes that keep one global adapter and make it anew at the end of a round: what they share, and what a round is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from legolm.adapter import Change, Tensors, slice_factors, under_prefix
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.aggregate.lowrank import product_slice
from legolm.block import Coverage


class Round(Protocol):
    """One round of a scheme."""

    def add(self, change: Change, coverage: Coverage) -> None:
        """Take one client's change."""

    def result(self, factors: Tensors) -> Tensors:
        """The factors (float32, by key) after the round, from those before it; without any change the same.

        Under `product.` they may hold the product that the factors are an approximation of, of any rank.
        """


class OneAdapter(Scheme):
    """The factors, and the round under way, which `make_round` begins from the start and the factors so far."""

    def __init__(
        self,
        make_round: Callable[[Start, Tensors], Round],
        unequal: Literal["no", "rank", "block"],
        dense: bool,
        streams: bool,
        basis_stays: bool = True,
        weighs: bool = True,
    ) -> None:
        self._make_round, self._weighs = make_round, weighs
        self.unequal, self.dense, self.streams, self.basis_stays = unequal, dense, streams, basis_stays

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        self._start = start
        self._factors = start.make() if state is None else dict(state)
        self._round = self._make_round(start, self._factors)

    def weighs(self) -> bool:
        """As `make_round`'s rounds do."""
        return self._weighs

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the global adapter: its first `rank` rank rows."""
        return slice_factors(coverage, factors_in(self._factors), rank)

    def whole(self, coverage: Coverage, rank: int) -> Tensors:
        """The slice of the whole product, where rounds give one."""
        product = under_prefix("product", self._factors)
        return product_slice(coverage, product, factors_in(self._factors)) or self.payload(coverage, rank)

    def add(self, change: Change, coverage: Coverage) -> None:
        """Add to the round."""
        self._round.add(change, coverage)

    def finish(self) -> None:
        """Take the round's result and begin another."""
        self._factors = self._round.result(self._factors)
        self._round = self._make_round(self._start, self._factors)

    def state(self) -> Tensors:
        """Factors by key; a product under `product.`."""
        return dict(self._factors)
