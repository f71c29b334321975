"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacking instead of averaging, for dense clients of any rank.

The server sends all clients' factors stacked, weighted by examples: the exact mean product. Every client merges it into
its base and starts a fresh adapter. The download grows with the clients: Σ r_k instead of r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from legolm.adapter import Tensors, initial_factors
from legolm.aggregate.folding import Folding, Weighted
from legolm.aggregate.interface import Start, scheme
from legolm.block import Coverage


@scheme("flora")
class Flora(Folding):
    """The fresh adapter comes from a seed of its round, at the client too: it is not sent."""

    unequal = "rank"
    fresh = True

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        super().begin(start, state)
        self.derived_seed = start.seed
        if state is not None:
            self._refresh()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """Nothing: the client makes its adapter itself."""
        return {}

    def fold_rank(self, ranks: Sequence[int], rank: int) -> int:
        """All clients' factors."""
        return sum(ranks)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """What is folded; before the first round the fresh adapter, whose product is zero."""
        return self.fold(coverage, 0) or super().payload(coverage, rank)

    def finish(self) -> None:
        """Fold the stack; a fresh adapter."""
        super().finish()
        self._refresh()

    def _next(self, name: str, clients: list[Weighted]) -> tuple[Tensor, Tensor]:
        eta = self._start.server.server_learning_rate
        return torch.cat([eta * share * b for share, b, _ in clients], 1), torch.cat([a for *_, a in clients], 0)

    def _refresh(self) -> None:
        self.derived_seed = (self._start.seed + len(self._ranks)) % (1 << 63)
        targets = {name.rpartition(".")[2] for name in self._names}
        fresh = initial_factors(self._start.shape, targets, self._start.rank, self.derived_seed)
        self._factors = {key: fresh[key] for key in self._factors}
