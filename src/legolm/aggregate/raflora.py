"""raFLoRA (Wu et al., arXiv 2602.13486): FlexLoRA with rank partitions.

A mean over all clients dilutes what only the higher ranks hold, round after round, until the update's energy sits in
the smallest shared rank. So each rank row of the clients' products is averaged over those who have it: row j of client
k counts n_k / Σ n_i over clients i with r_i > j.
"""

from __future__ import annotations

import torch

from legolm.adapter import Change, Tensors, parse_key
from legolm.aggregate.flexlora import FlexRound, WholeProduct
from legolm.aggregate.interface import Scheme, Start, scheme
from legolm.aggregate.lowrank import ProductSum
from legolm.block import Coverage


class _Round:
    """One stack for each rank row, so that each can have its own denominator at the end of the round."""

    def __init__(self, start: Start) -> None:
        self._start, self._whole = start, FlexRound(start)
        self._parts: dict[tuple[str, int], ProductSum] = {}
        self._behind = [0.0] * start.rank

    def add(self, change: Change, coverage: Coverage) -> None:
        """Stack the client's product by rank row."""
        n = float(change.examples)
        for name in change.modules:
            a, b = change.ended(name)
            _, module, _ = parse_key(f"{name}.A")
            rows, cols = self._start.shape.matrix(module)
            for j in range(change.rank):
                part = self._parts.setdefault((name, j), ProductSum(rows, cols))
                part.add(n * b[:, j : j + 1].double(), a[j : j + 1])
        for j in range(change.rank):
            self._behind[j] += n
        self._whole.examples += n

    def result(self, factors: Tensors) -> Tensors:
        """Σ over rank rows of their means; then FlexLoRA's SVD."""
        for (name, j), part in self._parts.items():
            whole = self._whole.products.setdefault(name, ProductSum(part.rows, part.cols))
            # FlexLoRA divides by all examples of the round.
            share = self._whole.examples / self._behind[j]
            part.scale(rows=torch.full((part.rows,), share, dtype=torch.float64))
            whole.absorb(part)
        return self._whole.result(factors)


@scheme("raflora")
def raflora() -> Scheme:
    """No settings."""
    return WholeProduct(_Round)
