"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): dense clients of different rank.

The server takes the mean of the clients' products B_k A_k, weighted by examples, and gives each client the first r_k
directions of its SVD: B = U σ, A = V. The published code makes the dense product and its full SVD; here the same comes
from the stacked factors. A full SVD has orthonormal rows of V where σ is zero, so that those directions learn: here
they are as much of the old A as V leaves. The LLM is scored and written with the whole mean product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, parse_key
from legolm.aggregate.interface import Scheme, Start, scheme
from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.one_adapter import OneAdapter, Round
from legolm.block import Coverage


class FlexRound:
    """Stacked products of the round: r_k (m + n) numbers a client and module, at most the dense matrix."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.products: dict[str, ProductSum] = {}
        self.examples = 0.0

    def add(self, change: Change, coverage: Coverage) -> None:
        """Stack the product that the client ended with."""
        n = float(change.examples)
        for name in change.modules:
            a, b = change.ended(name)
            _, module, _ = parse_key(f"{name}.A")
            self.products.setdefault(name, ProductSum(*self._start.shape.matrix(module))).add(n * b.double(), a)
        self.examples += n

    def result(self, factors: Tensors) -> Tensors:
        """The SVD of P = (1 − η) P + η Σ n_k B_k A_k / Σ n_k, to the run's rank; under `product.` the whole of it."""
        found, eta, rank = dict(factors), self._start.server.eta, self._start.rank
        for name, products in self.products.items():
            a, b = factors[f"{name}.A"], factors[f"{name}.B"]
            products.scale(rows=torch.full((products.rows,), eta / self.examples, dtype=torch.float64))
            if eta != 1:
                old_a, old_b = (factors.get(f"product.{name}.{side}", factors[f"{name}.{side}"]) for side in "AB")
                products.add((1 - eta) * old_b, old_a)
            (u, s, v), (left, right) = products.best_and_whole(rank)
            found |= {f"product.{name}.A": right.float(), f"product.{name}.B": left.float()}
            a, b = torch.zeros_like(a), torch.zeros_like(b)
            b[:, : len(s)] = (u * s).float()
            rows = torch.cat([v, complement(factors[f"{name}.A"], v)])[:rank].float()
            a[: len(rows)] = rows
            found[f"{name}.A"], found[f"{name}.B"] = a, b
        return found


def complement(rows: Tensor, v: Tensor) -> Tensor:
    """Orthonormal rows (float64) across the orthonormal `v` (k, n), in the space of `rows` (r, n) first.

    Of r independent rows at least r − k directions are left.
    """
    left = rows.double()
    left = left - (left @ v.T) @ v
    found: Tensor = torch.linalg.svd(left, full_matrices=False).Vh
    return found


class WholeProduct(OneAdapter):
    """One adapter from an SVD, and all of the mean product beside it."""

    def __init__(self, make_round: Callable[[Start], Round]) -> None:
        super().__init__(
            lambda start, factors: make_round(start), unequal="rank", dense=True, streams=False, basis_stays=False
        )

    def held_rank(self, ranks: Sequence[int], rank: int, rounds: int) -> int:
        """The sum of the clients' products."""
        return sum(ranks)


@scheme("flexlora")
def flexlora() -> Scheme:
    """No settings."""
    return WholeProduct(FlexRound)
