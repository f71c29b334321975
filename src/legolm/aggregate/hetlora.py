"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): dense clients of different rank.

A client gets the first r_k rank rows. The server pads its factors with zeros and takes their mean, weighted by the
Frobenius norm of its product ΔW_k = B_k A_k (the paper's sparsity weight), module by module. The paper's third part,
rank self-pruning at the client, is not here: this is its γ = 1.
"""

from __future__ import annotations

import torch

from legolm.adapter import Change, Tensors
from legolm.aggregate.interface import Scheme, Start, scheme
from legolm.aggregate.lowrank import frobenius
from legolm.aggregate.one_adapter import OneAdapter
from legolm.aggregate.weight import EntryWeight, Placement
from legolm.block import Coverage


class _Round:
    """Σ ‖ΔW_k‖ · pad(factors) and Σ ‖ΔW_k‖ by module."""

    def __init__(self, start: Start, factors: Tensors) -> None:
        self._eta = start.server.eta
        self._sum = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in factors.items()}
        self._norms: dict[str, float] = {}
        self._weight = EntryWeight(start.shape, start.rank)

    def add(self, change: Change, coverage: Coverage) -> None:
        """Weigh and pad the factors that the client ended with."""
        placement = Placement.of(coverage)
        for name in change.modules:
            a, b = change.ended(name)
            norm = frobenius(b, a)
            self._norms[name] = self._norms.get(name, 0.0) + norm
            for key, value in ((f"{name}.A", a), (f"{name}.B", b)):
                placement.add(key, self._sum[key], value, norm)
        self._weight.add(coverage, change.rank, float(change.examples))

    def result(self, factors: Tensors) -> Tensors:
        """θ + η (mean − θ) where somebody trained; a module whose products are all zero stays."""
        found = dict(factors)
        for key, theta in factors.items():
            norm = self._norms.get(key.rpartition(".")[0], 0.0)
            if norm > 0:
                old = theta.double()
                step = self._eta * (self._sum[key] / norm - old)
                found[key] = (old + torch.where(self._weight.of(key, theta) > 0, step, 0.0)).float()
        return found


@scheme("hetlora")
def hetlora() -> Scheme:
    """No settings."""
    return OneAdapter(_Round, unequal="rank", dense=True, streams=True, weighs=False)
