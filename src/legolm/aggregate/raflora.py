"""raFLoRA (Wu et al., arXiv 2602.13486): FlexLoRA with rank partitions.

A mean over all clients dilutes what only the higher ranks hold, round after round, until the update's energy sits in
the smallest shared rank. So each rank row of the clients' products is averaged over those who have it: row j of client
k counts n_k / Σ n_i over clients i with r_i > j.
"""

from __future__ import annotations

import torch

from legolm.adapter import Update, parse_key
from legolm.aggregate.flexlora import FlexLora
from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.scheme import scheme
from legolm.block import Coverage


@scheme("raflora")
class RaFlora(FlexLora):
    """One stack for each rank row, so that each can have its own denominator at the end of the round."""

    def add(self, update: Update, coverage: Coverage) -> None:
        """Stack the client's product by rank row."""
        n = float(update.examples)
        for name in sorted({key.rpartition(".")[0] for key in update.delta}):
            a, b = (update.received[f"{name}.{side}"] + update.delta[f"{name}.{side}"] for side in "AB")
            _, module, _ = parse_key(f"{name}.A")
            rows, cols = self._start.shape.matrix(module)
            for j in range(update.rank):
                part = self._parts.setdefault((name, j), ProductSum(rows, cols))
                part.add(n * b[:, j : j + 1].double(), a[j : j + 1])
        for j in range(update.rank):
            self._behind[j] += n
        self._round.add(coverage, update.rank, n)
        self._examples += n

    def _make(self) -> None:
        """Σ over rank rows of their means; then FlexLoRA's SVD."""
        for (name, j), part in self._parts.items():
            whole = self._products.setdefault(name, ProductSum(part.rows, part.cols))
            # FlexLoRA divides by all examples of the round.
            part.scale(rows=torch.full((part.rows,), self._examples / self._behind[j], dtype=torch.float64))
            whole.absorb(part)
        super()._make()

    def _reset(self) -> None:
        super()._reset()
        self._parts: dict[tuple[str, int], ProductSum] = {}
        self._behind = torch.zeros(self._start.rank, dtype=torch.float64).tolist()
