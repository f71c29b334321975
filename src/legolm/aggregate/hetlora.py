"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): dense clients of different rank.

A client gets the first r_k rank rows. The server pads its factors with zeros and takes their mean, weighted by the
Frobenius norm of its product ΔW_k = B_k A_k (the paper's sparsity weight), module by module. The paper's third part,
rank self-pruning at the client, is not here: this is its γ = 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from legolm.adapter import Update
from legolm.aggregate.adapter import OneAdapter
from legolm.aggregate.lowrank import frobenius
from legolm.aggregate.scheme import scheme
from legolm.aggregate.weight import Placement
from legolm.block import Coverage


@scheme("hetlora")
class HetLora(OneAdapter):
    """Σ ‖ΔW_k‖ · pad(factors) and Σ ‖ΔW_k‖ by module."""

    unequal_shapes: ClassVar[Literal["no", "rank", "block"]] = "rank"
    dense: ClassVar[bool] = True

    def add(self, update: Update, coverage: Coverage) -> None:
        """Weigh and pad the factors that the client ended with."""
        placement = Placement.of(coverage)
        for name in {key.rpartition(".")[0] for key in update.delta}:
            a, b = (update.received[f"{name}.{side}"] + update.delta[f"{name}.{side}"] for side in "AB")
            weight = frobenius(b, a)
            self._weight[name] = self._weight.get(name, 0.0) + weight
            for key, value in ((f"{name}.A", a), (f"{name}.B", b)):
                placement.add(key, self._sum[key], value, weight)
        self._round.add(coverage, update.rank, float(update.examples))

    def _make(self) -> None:
        """θ + η (mean − θ) where somebody trained; a module whose products are all zero stays."""
        for key, theta in self._factors.items():
            weight = self._weight.get(key.rpartition(".")[0], 0.0)
            if weight > 0:
                old = theta.double()
                change = self._config.server_learning_rate * (self._sum[key] / weight - old)
                self._factors[key] = (old + torch.where(self._round.of(key, theta) > 0, change, 0.0)).float()

    def _reset(self) -> None:
        super()._reset()
        self._sum = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in self._factors.items()}
        self._weight: dict[str, float] = {}
