"""HeteAgg in factor form (LEGO, arXiv 2410.18287, and its patent application US 2026/0010799 A1, claims 5 and 6).

A and B each for itself, over clients k with weight n_k (examples), structural coverage c_k and change Δ_k of what they
received:

    N = Σ n_k m_k ∘ Δ_k,    θ' = θ + η · N / D

D is Σ n_k c_k (`coverage_mean`: the mean over those who hold the entry) or Σ n_k (`global_fill`: what a client lacks
stays the LLM's in that client's share). m_k is c_k, or (`saliency`) only the (1 − s) largest |Δ_k| of each tensor of a
block of sparsity s; a saliency mask never enters D. Memory: one model's factors, whatever the number of clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from legolm.aggregate.scheme import scheme
from legolm.config import AggregateConfig
from legolm.coverage import Coverage, add_slice, slice_factors
from legolm.types import GlobalAdapter, Tensors, Update


@scheme("heteagg")
class HeteAgg:
    """One round's sums N and D in float64 beside the global adapter θ in float32."""

    def __init__(self, start: GlobalAdapter, config: AggregateConfig) -> None:
        self._config = config
        self._factors = dict(start.factors)
        self._weight = dict(start.weight)
        self._rank, self._scale = start.rank, start.scale
        self._reset()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the global adapter."""
        return slice_factors(coverage, self._factors, rank)

    def add(self, update: Update, coverage: Coverage) -> None:
        """N += n m ∘ Δ and D += n c, at the entries that the block holds."""
        n = float(update.examples)
        self._examples += n
        for key, delta in update.delta.items():
            change = n * delta.double()
            if self._config.mask == "saliency":
                change = change * most_salient(delta, coverage.sparsity)
            add_slice(coverage, key, self._sum[key], update.rank, change)
            add_slice(coverage, key, self._covered[key], update.rank, n)

    def finish(self) -> GlobalAdapter:
        """θ + η N / D where somebody trained; elsewhere θ."""
        for key, total in self._sum.items():
            covered = self._covered[key]
            d = covered if self._config.denominator == "coverage_mean" else torch.full_like(covered, self._examples)
            step = torch.where(covered > 0, total / d, 0.0)
            self._factors[key] = (self._factors[key].double() + self._config.server_learning_rate * step).float()
            self._weight[key] = (self._weight[key].double() + covered).float()
        self._reset()
        return GlobalAdapter(dict(self._factors), dict(self._weight), self._rank, self._scale)

    def state(self) -> Tensors:
        """Factors and, under `weight.`, the weight behind each entry."""
        return self._factors | {f"weight.{key}": tensor for key, tensor in self._weight.items()}

    def load_state(self, state: Tensors) -> None:
        """Go on from `state()`."""
        self._factors = {key: tensor for key, tensor in state.items() if not key.startswith("weight.")}
        self._weight = {
            key.removeprefix("weight."): tensor for key, tensor in state.items() if key.startswith("weight.")
        }
        self._reset()

    def _reset(self) -> None:
        self._examples = 0.0
        self._sum = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in self._factors.items()}
        self._covered = {key: torch.zeros_like(tensor) for key, tensor in self._sum.items()}


def most_salient(delta: Tensor, sparsity: float) -> Tensor:
    """Bool mask of the (1 − sparsity) largest |delta|; ties go to the earlier entry."""
    count = round((1 - sparsity) * delta.numel())
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(delta)
