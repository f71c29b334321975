"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): dense clients of different rank.

The server takes the mean of the clients' products B_k A_k, weighted by examples, and gives each client the first r_k
directions of its SVD: B = U σ, A = V. The published code makes the dense product and its full SVD; here the same comes
from the stacked factors.
"""

from __future__ import annotations

import torch

from legolm.adapter import Change, Tensors, parse_key
from legolm.aggregate.interface import Scheme, Start, scheme
from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.one_adapter import OneAdapter
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
        """The SVD of (1 − η) BA + η Σ n_k B_k A_k / Σ n_k, to the run's rank."""
        found, eta, rank = dict(factors), self._start.server.server_learning_rate, self._start.rank
        for name, products in self.products.items():
            a, b = factors[f"{name}.A"], factors[f"{name}.B"]
            products.scale(rows=torch.full((products.rows,), eta / self.examples, dtype=torch.float64))
            if eta != 1:
                products.add((1 - eta) * b, a)
            u, s, v = products.best(rank)
            a, b = torch.zeros(rank, v.shape[1]), torch.zeros(u.shape[0], rank)
            a[: len(s)], b[:, : len(s)] = v.float(), (u * s).float()
            found[f"{name}.A"], found[f"{name}.B"] = a, b
        return found


@scheme("flexlora")
def flexlora() -> Scheme:
    """No settings."""
    return OneAdapter(lambda start, factors: FlexRound(start), unequal="rank", dense=True, streams=False)
