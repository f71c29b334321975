"""Schemes whose rounds change the clients' base: each round's change is shipped once, as low-rank factors, and counted.

The server keeps every round's change, so that a client that missed rounds gets all that it lacks.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from legolm.adapter import GlobalAdapter, Tensors, Update, concatenated, slice_factors, under_prefix, with_prefix
from legolm.aggregate.scheme import Scheme, Start
from legolm.aggregate.weight import EntryWeight
from legolm.block import Coverage
from legolm.config import AggregateConfig

Weighted = tuple[float, Tensor, Tensor]
"""A client's share of the examples, its B and its A, float64."""


class Folding(Scheme):
    """`_fold` holds all rounds' changes stacked, A (R, in) and B (out, R); `_ranks` each round's share of R."""

    streaming: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    def __init__(self, start: Start, config: AggregateConfig) -> None:
        self._start, self._config = start, config
        self._factors = dict(start.factors)
        self._names = sorted({key.rpartition(".")[0] for key in self._factors})
        self._fold: Tensors = {}
        self._ranks: list[int] = []
        self._total = EntryWeight(start.shape, start.rank)
        self._reset()

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
        return concatenated(self.payload(coverage, rank), self.fold(coverage, 0))

    def add(self, update: Update, coverage: Coverage) -> None:
        """Keep the factors that the client ended with, weighted by its examples."""
        n = float(update.examples)
        for name in self._names:
            a, b = (update.received[f"{name}.{side}"] + update.delta[f"{name}.{side}"] for side in "AB")
            self._held.setdefault(name, []).append((n, b.double(), a.double()))
        self._round.add(coverage, update.rank, n)
        self._examples += n

    def finish(self) -> GlobalAdapter:
        """Fold what this scheme folds; the next adapter."""
        if self._examples:
            total = self._examples
            held = {name: [(n / total, b, a) for n, b, a in self._held[name]] for name in self._names}
            changes = {name: self._next(name, clients) for name, clients in held.items()}
            self._ranks.append(next(iter(changes.values()))[1].shape[0])
            for name, (b, a) in changes.items():
                old_a, old_b = self._fold.get(f"{name}.A"), self._fold.get(f"{name}.B")
                self._fold[f"{name}.A"] = a.float() if old_a is None else torch.cat([old_a, a.float()], 0)
                self._fold[f"{name}.B"] = b.float() if old_b is None else torch.cat([old_b, b.float()], 1)
        else:
            self._ranks.append(0)
        self._total.merge(self._round)
        self._reset()
        return GlobalAdapter(
            dict(self._factors), self._total.expand(self._factors), self._start.rank, self._start.scale
        )

    def state(self) -> Tensors:
        """Factors by key, the changes of the base under `fold.`, their ranks, the weights under `weight.`."""
        ranks = {"ranks": torch.tensor(self._ranks, dtype=torch.int64)}
        return self._factors | ranks | with_prefix("fold", self._fold) | with_prefix("weight", self._total.state())

    def load_state(self, state: Tensors) -> None:
        """Go on from `state()`."""
        self._factors = {key: state[key] for key in self._factors}
        self._fold = under_prefix("fold", state)
        self._ranks = [int(rank) for rank in state["ranks"]]
        self._total.load_state(under_prefix("weight", state))

    @abstractmethod
    def _next(self, name: str, clients: list[Weighted]) -> tuple[Tensor, Tensor]:
        """Set the module's next adapter; return B (m, R) and A (R, n) of the change of its base."""

    def _reset(self) -> None:
        self._held: dict[str, list[Weighted]] = {}
        self._round = EntryWeight(self._start.shape, self._start.rank)
        self._examples = 0.0
