"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): dense clients of different rank.

The server takes the mean of the clients' products B_k A_k, weighted by examples, and gives each client the first r_k
directions of its SVD: B = U σ, A = V. The published code makes the dense product and its full SVD; here the same comes
from the stacked factors.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.scheme import Scheme, Start, scheme, under_prefix, with_prefix
from legolm.aggregate.weight import EntryWeight
from legolm.config import AggregateConfig
from legolm.coverage import Coverage, parse_key, slice_factors
from legolm.types import GlobalAdapter, Tensors, Update


@scheme("flexlora")
class FlexLora(Scheme):
    """Stacked products of the round: r_k (m + n) numbers a client and module, at most the dense matrix."""

    streaming: ClassVar[bool] = False
    secure_sum: ClassVar[bool] = False
    unequal_shapes: ClassVar[Literal["no", "rank", "block"]] = "rank"
    dense: ClassVar[bool] = True

    def __init__(self, start: Start, config: AggregateConfig) -> None:
        self._start, self._config = start, config
        self._factors = dict(start.factors)
        self._total = EntryWeight(start.shape, start.rank)
        self._reset()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The first `rank` directions."""
        return slice_factors(coverage, self._factors, rank)

    def add(self, update: Update, coverage: Coverage) -> None:
        """Stack the product that the client ended with."""
        n = float(update.examples)
        for name in sorted({key.rpartition(".")[0] for key in update.delta}):
            a, b = (update.received[f"{name}.{side}"] + update.delta[f"{name}.{side}"] for side in "AB")
            _, module, _ = parse_key(f"{name}.A")
            self._products.setdefault(name, ProductSum(*self._start.shape.matrix(module))).add(n * b.double(), a)
        self._round.add(coverage, update.rank, n)
        self._examples += n

    def finish(self) -> GlobalAdapter:
        """The SVD of (1 − η) BA + η Σ n_k B_k A_k / Σ n_k, to the run's rank."""
        eta = self._config.server_learning_rate
        for name, products in self._products.items():
            a, b = self._factors[f"{name}.A"], self._factors[f"{name}.B"]
            products.scale(rows=torch.full((products.rows,), eta / self._examples, dtype=torch.float64))
            if eta != 1:
                products.add((1 - eta) * b, a)
            self._factors[f"{name}.A"], self._factors[f"{name}.B"] = self._split(*products.best(self._start.rank))
        self._total.merge(self._round)
        self._reset()
        return GlobalAdapter(
            dict(self._factors), self._total.expand(self._factors), self._start.rank, self._start.scale
        )

    def state(self) -> Tensors:
        """Factors by key, and the weights under `weight.`."""
        return self._factors | with_prefix("weight", self._total.state())

    def load_state(self, state: Tensors) -> None:
        """Go on from `state()`."""
        self._factors = {key: state[key] for key in self._factors}
        self._total.load_state(under_prefix("weight", state))

    def _split(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rank = self._start.rank
        a, b = torch.zeros(rank, v.shape[1]), torch.zeros(u.shape[0], rank)
        a[: len(s)], b[:, : len(s)] = v.float(), (u * s).float()
        return a, b

    def _reset(self) -> None:
        self._products: dict[str, ProductSum] = {}
        self._round = EntryWeight(self._start.shape, self._start.rank)
        self._examples = 0.0
