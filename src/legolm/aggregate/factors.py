"""The factor form: A and B each for itself, one pair of sums whatever the number of clients.

    N = Σ n_k Δ_k ,    θ' = θ + step(N / D)

over clients k with n_k examples and change Δ_k of what they received, placed in the LLM's coordinates. D is Σ n_k c_k
with c_k the structural coverage (`coverage_mean`: the mean over those who hold the entry) or Σ n_k (`global_fill`: what
a client lacks stays the LLM's in that client's share). `step` is η or a server optimizer.

Memory: one model's factors in float64 and float32, and the weights by unit.
"""

from __future__ import annotations

import torch

from legolm.adapter import Flat, GlobalAdapter, Tensors, Update, is_frozen, slice_factors, under_prefix, with_prefix
from legolm.aggregate.optimizer import ServerOptimizer
from legolm.aggregate.scheme import Scheme, Start
from legolm.aggregate.weight import EntryWeight, Placement
from legolm.block import Coverage
from legolm.config import AggregateConfig

PIECE = 1 << 17
"""Entries that are added at once: sum, update and its float64 copy stay in the cache."""


class FactorSum(Scheme):
    """The global adapter θ (float32), its weights, and one round's sums.

    With `form: frozen_side` only one factor of each module trains and travels: the one on the side that blocks cut.
    The other is random orthonormal and stays (FFA-LoRA, arXiv 2403.12313, made heterogeneous), so that the mean of the
    trained factor is the mean of the product.
    """

    def __init__(self, start: Start, config: AggregateConfig) -> None:
        self._start, self._config = start, config
        self._factors = dict(start.factors)
        frozen_side = config.form == "frozen_side"
        self.derived_seed = start.seed if frozen_side else None
        self._trained = [key for key in sorted(self._factors) if not (frozen_side and is_frozen(key, start.shape))]
        self._optimizer = ServerOptimizer(config)
        self._total, self._round = (EntryWeight(start.shape, start.rank) for _ in range(2))
        self._examples = 0.0
        # One buffer for all sums: clearing it is one call.
        sizes = [self._factors[key].numel() for key in self._trained]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.float64)
        parts = torch.split(self._buffer, sizes)
        self._sum = {key: part.view_as(self._factors[key]) for key, part in zip(self._trained, parts, strict=True)}

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the factors that train."""
        return slice_factors(coverage, {key: self._factors[key] for key in self._trained}, rank)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of all factors."""
        return slice_factors(coverage, self._factors, rank)

    def add(self, update: Update, coverage: Coverage) -> None:
        """N += n Δ and D += n c, at the entries that the block holds."""
        n = float(update.examples)
        self._round.add(coverage, update.rank, n)
        self._examples += n
        placement = Placement.of(coverage)
        if isinstance(update.delta, Flat) and placement.whole and update.rank == self._start.rank:
            # The whole LLM's update lies as the sums do: one addition.
            for at in range(0, len(self._buffer), PIECE):
                self._buffer[at : at + PIECE].add_(update.delta.flat[at : at + PIECE], alpha=n)
            return
        for key, delta in update.delta.items():
            placement.add(key, self._sum[key], delta, n)

    def finish(self) -> GlobalAdapter:
        """θ + step(N / D) where somebody trained; elsewhere θ."""
        for key in self._trained if self._examples else ():
            weight = self._round.of(key, self._factors[key])
            trained = weight > 0
            d = weight if self._config.denominator == "coverage_mean" else self._examples
            gradient = torch.where(trained, self._sum[key] / d, 0.0)
            change = self._optimizer.step(key, gradient, trained)
            self._factors[key] = (self._factors[key].double() + change).float()
        self._total.merge(self._round)
        self._round, self._examples = EntryWeight(self._start.shape, self._start.rank), 0.0
        self._buffer.zero_()
        return GlobalAdapter(
            dict(self._factors), self._total.expand(self._factors), self._start.rank, self._start.scale
        )

    def state(self) -> Tensors:
        """Factors by key; under `weight.` the weight behind entries; the optimizer's moments."""
        return self._factors | with_prefix("weight", self._total.state()) | self._optimizer.state()

    def load_state(self, state: Tensors) -> None:
        """Go on from `state()`."""
        self._factors = {key: state[key] for key in self._factors}
        self._total.load_state(under_prefix("weight", state))
        self._optimizer.load_state(state)
