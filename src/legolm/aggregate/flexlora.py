"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): dense clients of different rank.

The server takes the mean of the clients' products B_k A_k, weighted by examples, and gives each client the first r_k
directions of its SVD: B = U σ, A = V. The published code makes the dense product and its full SVD; here the same comes
from the stacked factors.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from legolm.adapter import Update, parse_key
from legolm.aggregate.adapter import OneAdapter
from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.scheme import scheme
from legolm.block import Coverage


@scheme("flexlora")
class FlexLora(OneAdapter):
    """Stacked products of the round: r_k (m + n) numbers a client and module, at most the dense matrix."""

    streaming: ClassVar[bool] = False
    unequal_shapes: ClassVar[Literal["no", "rank", "block"]] = "rank"
    dense: ClassVar[bool] = True

    def add(self, update: Update, coverage: Coverage) -> None:
        """Stack the product that the client ended with."""
        n = float(update.examples)
        for name in sorted({key.rpartition(".")[0] for key in update.delta}):
            a, b = (update.received[f"{name}.{side}"] + update.delta[f"{name}.{side}"] for side in "AB")
            _, module, _ = parse_key(f"{name}.A")
            self._products.setdefault(name, ProductSum(*self._start.shape.matrix(module))).add(n * b.double(), a)
        self._round.add(coverage, update.rank, n)
        self._examples += n

    def _make(self) -> None:
        """The SVD of (1 − η) BA + η Σ n_k B_k A_k / Σ n_k, to the run's rank."""
        eta = self._config.server_learning_rate
        for name, products in self._products.items():
            a, b = self._factors[f"{name}.A"], self._factors[f"{name}.B"]
            products.scale(rows=torch.full((products.rows,), eta / self._examples, dtype=torch.float64))
            if eta != 1:
                products.add((1 - eta) * b, a)
            self._factors[f"{name}.A"], self._factors[f"{name}.B"] = self._split(*products.best(self._start.rank))

    def _split(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rank = self._start.rank
        a, b = torch.zeros(rank, v.shape[1]), torch.zeros(u.shape[0], rank)
        a[: len(s)], b[:, : len(s)] = v.float(), (u * s).float()
        return a, b

    def _reset(self) -> None:
        super()._reset()
        self._products: dict[str, ProductSum] = {}
        self._examples = 0.0
