"""Schemes whose rounds change the clients' base: each round's change is shipped once, as low-rank factors, and counted.

The server keeps every round's change, so that a client that missed rounds gets all that it lacks. It keeps what arrives
at the clients after the codec, so that both have the same base.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, concatenated, slice_factors, under_prefix, with_prefix
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.block import Coverage

Weighted = tuple[float, Tensor, Tensor]
"""A client's share of the examples, its B and its A, float64."""


class Folding(Scheme):
    """`_fold` holds all rounds' changes stacked, A (R, in) and B (out, R); `_ranks` each round's share of R."""

    streams = False
    dense = folds = True

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        self._start = start
        self._factors = start.make() if state is None else factors_in(state)
        self._names = sorted({key.rpartition(".")[0] for key in self._factors})
        self._fold: Tensors = {} if state is None else under_prefix("fold", state)
        self._ranks: list[int] = [] if state is None else [int(rank) for rank in state["ranks"]]
        self._reset()

    def held_rank(self, ranks: Sequence[int], rank: int, rounds: int) -> int:
        """All rounds' changes."""
        return rounds * self.fold_rank(ranks, rank)

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the adapter that trains."""
        return slice_factors(coverage, self._factors, rank)

    def fold(self, coverage: Coverage, since: int) -> Tensors:
        """The changes of the base after round `since`."""
        skip = sum(self._ranks[:since])
        left = sum(self._ranks) - skip
        if not left:
            return {}
        parts = {key: t[skip:] if key.endswith(".A") else t[:, skip:] for key, t in self._fold.items()}
        return slice_factors(coverage, parts, left)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """Both, as one adapter."""
        return concatenated(self.fold(coverage, 0), self.payload(coverage, rank))

    def add(self, change: Change, coverage: Coverage) -> None:
        """Keep the factors that the client ended with, weighted by its examples."""
        n = float(change.examples)
        for name in self._names:
            a, b = change.ended(name)
            self._held.setdefault(name, []).append((n, b.double(), a.double()))
        self._examples += n

    def finish(self) -> None:
        """Fold what this scheme folds; the next adapter."""
        if self._examples:
            total = self._examples
            held = {name: [(n / total, b, a) for n, b, a in self._held[name]] for name in self._names}
            changes = {name: self._next(name, clients) for name, clients in held.items()}
            self._ranks.append(next(iter(changes.values()))[1].shape[0])
            made: Tensors = {}
            for name, (b, a) in changes.items():
                made |= {f"{name}.A": a.float(), f"{name}.B": b.float()}
            self._fold = concatenated(self._fold, self._start.arrived(made))
        else:
            self._ranks.append(0)
        self._reset()

    def state(self) -> Tensors:
        """Factors by key, the changes of the base under `fold.`, their ranks."""
        ranks = {"ranks": torch.tensor(self._ranks, dtype=torch.int64)}
        return self._factors | ranks | with_prefix("fold", self._fold)

    @abstractmethod
    def _next(self, name: str, clients: list[Weighted]) -> tuple[Tensor, Tensor]:
        """Set the module's next adapter; return B (m, R) and A (R, n) of the change of its base."""

    def _reset(self) -> None:
        self._held: dict[str, list[Weighted]] = {}
        self._examples = 0.0
