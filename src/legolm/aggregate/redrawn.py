"""The frozen side made anew after every n rounds: rank grows with the rounds, and a round has the bytes of one.

In period t all train B_t beside the same A_t, made from a seed of t (where blocks cut columns, A trains beside B).
After its n rounds

    base += B_t A_t ,    B_{t+1} = 0

for every block and the LLM. The mean of one factor times the other is the mean of the products, and a round stays a
plain sum. The fold costs no bytes: it is what clients would train from, had the side stayed, and goes in the place of
the zeros that they train from instead, which they make themselves, as they do all frozen sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from legolm.adapter import Tensors, concatenated, initial_factors, parse_key, slice_factors, under_prefix, with_prefix
from legolm.aggregate.factors import Denominator, FactorSum
from legolm.aggregate.interface import Start
from legolm.block import Coverage


class RedrawnSide(FactorSum):
    """`_fold` holds all ended periods' factors stacked, each of the run's rank: a base is everyone's, whole."""

    folds = True
    optimizers = False
    """Moments are of entries beside one frozen side: they mean nothing beside the next."""

    def __init__(self, denominator: Denominator, salient: bool, every: int) -> None:
        super().__init__(denominator, frozen_side=True, salient=salient)
        self._every = every
        self.basis_stays = every > 1  # within a period

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        super().begin(start, state)
        self._fold: Tensors = {} if state is None else under_prefix("fold", state)
        self._rounds = 0 if state is None else int(state["rounds"])
        self.derived_seed = self._seed(self._rounds // self._every)

    def fold(self, coverage: Coverage, since: int) -> Tensors:
        """The periods that ended after round `since`."""
        first, last = since // self._every, self._rounds // self._every
        if first == last:
            return {}
        left: Tensors = {}
        for key, tensor in self._fold.items():
            along = 0 if key.endswith(".A") else 1
            each = tensor.shape[along] // last
            left[key] = tensor.narrow(along, first * each, (last - first) * each)
        return slice_factors(coverage, left, (last - first) * self._start.rank)

    def fold_seeds(self, since: int) -> list[int]:
        """One a period."""
        return [self._seed(period) for period in range(since // self._every, self._rounds // self._every)]

    def fold_rank(self, ranks: Sequence[int], rank: int) -> int:
        """A period's, in the round after it, in place of the factors."""
        return rank

    def held_rank(self, ranks: Sequence[int], rank: int, rounds: int) -> int:
        """All ended periods'."""
        return rounds // self._every * rank

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """All that is folded, and what the period under way learned beside it, if it has begun."""
        fold = self.fold(coverage, 0)
        return fold if fold and self._rounds % self._every == 0 else concatenated(fold, super().adapter(coverage, rank))

    def finish(self) -> None:
        """The round's step; at the end of a period, which is one for all whoever replied, the fold and a new side."""
        super().finish()
        self._rounds += 1
        if self._rounds % self._every == 0:
            trained = self._start.arrived({key: self._factors[key] for key in self._trained})
            self._fold = concatenated(self._fold, self._factors | trained)
            self.derived_seed = self._seed(self._rounds // self._every)
            ranks = {parse_key(key)[1].rpartition(".")[2]: len(t) for key, t in self._factors.items() if key[-1] == "A"}
            shape, rank = self._start.shape, self._start.rank
            self._factors = initial_factors(shape, ranks, rank, self.derived_seed, True, ranks)

    def state(self) -> Tensors:
        """Factors by key, the folded ones under `fold.`, and how many rounds there were."""
        return super().state() | with_prefix("fold", self._fold) | {"rounds": torch.tensor(self._rounds)}

    def _seed(self, period: int) -> int:
        return (self._start.seed + period) % (1 << 63)
