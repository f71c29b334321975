"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacking instead of averaging, for dense clients of any rank.

The server sends all clients' factors stacked, weighted by examples: the exact mean product. Every client merges it into
its base and starts a fresh adapter, drawn for this round and client as in the published code: stacked, other rows of A
span more directions than everyone's same ones. The download grows with the clients: Σ r_k instead of r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from legolm.adapter import Tensors
from legolm.aggregate.folding import Folding, Weighted
from legolm.aggregate.interface import Start, scheme
from legolm.block import Coverage


@scheme("flora")
class Flora(Folding):
    """Fresh adapters come from a seed of their round and client, at both ends: they are not sent."""

    unequal = "rank"
    fresh = True
    basis_stays = False

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        super().begin(start, state)
        self._next_seed()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """Nothing: the client makes its adapter itself."""
        return {}

    def fold_rank(self, ranks: Sequence[int], rank: int) -> int:
        """All clients' factors."""
        return sum(ranks)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """What is folded; before the first round the start, whose product is zero as that of all fresh adapters."""
        return self.fold(coverage, 0) or super().payload(coverage, rank)

    def finish(self) -> None:
        """Fold the stack; fresh adapters."""
        super().finish()
        self._next_seed()

    def _next(self, name: str, clients: list[Weighted]) -> tuple[Tensor, Tensor]:
        eta = self._start.server.eta
        return torch.cat([eta * share * b for share, b, _ in clients], 1), torch.cat([a for *_, a in clients], 0)

    def _next_seed(self) -> None:
        self.derived_seed = (self._start.seed + len(self._ranks)) % (1 << 63)
