"""The factor form: A and B each for itself, one pair of sums whatever the number of clients.

    N = Σ n_k Δ_k ,    θ' = θ + step(N / D)

over clients k with n_k examples and change Δ_k of what they received, placed in the LLM's coordinates. D is Σ n_k c_k
with c_k the structural coverage (`coverage_mean`: the mean over those who hold the entry) or Σ n_k (`global_fill`: what
a client lacks stays the LLM's in that client's share). `step` is η or a server optimizer.

Memory: one model's factors in float64 and float32, and the weights by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from legolm.adapter import Change, Flat, Tensors, is_frozen, is_whitened, slice_factors
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.aggregate.optimizer import ServerOptimizer
from legolm.aggregate.weight import EntryWeight, Placement
from legolm.block import Coverage

Denominator = Literal["coverage_mean", "global_fill"]
PIECE = 1 << 17
"""Entries that are added at once: sum, change and its float64 copy stay in the cache."""


class FactorSum(Scheme):
    """The global adapter θ (float32) and one round's sums.

    With `frozen_side` only one factor of each module trains and travels: the one on the side that blocks cut. The other
    is random orthonormal, or `whitened`, and stays (FFA-LoRA, arXiv 2403.12313, made heterogeneous), so that the mean
    of the trained factor is the mean of the product. One factor that trains alone needs, and bears, a higher rate than
    two. With `salient` clients send as large a share of their entries as their block's bit masks keep of weights: what
    the structure cuts is not in a client's slice, and is not cut a second time.
    """

    sums = module_ranks = optimizers = True

    def __init__(
        self,
        denominator: Denominator,
        frozen_side: bool = False,
        salient: bool = False,
        unequal: Literal["no", "rank", "block"] = "block",
        proximal: float = 0.0,
        whitened: str | None = None,
    ) -> None:
        self._denominator, self._salient, self.whitened = denominator, salient, whitened
        self.frozen_side, self.unequal, self.proximal = frozen_side, unequal, proximal
        self.learning_rate = 3e-3 if frozen_side else 2e-3

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        self._start = start
        self._factors = start.make() if state is None else factors_in(state)
        self.derived_seed = start.seed if self.frozen_side else None
        self._trained = [key for key in sorted(self._factors) if not (self.frozen_side and is_frozen(key, start.shape))]
        self._optimizer = ServerOptimizer(start.server, state or {})
        self._round, self._examples = EntryWeight(start.shape, start.rank), 0.0
        self._known: Tensors | None = None
        # One buffer for all sums: clearing it is one call.
        sizes = [self._factors[key].numel() for key in self._trained]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.float64)
        parts = torch.split(self._buffer, sizes)
        self._sum = {key: part.view_as(self._factors[key]) for key, part in zip(self._trained, parts, strict=True)}

    def keep(self, sparsity: float) -> float:
        """1 − s of a saliency mask."""
        return 1 - sparsity if self._salient else 1.0

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the factors that train."""
        return slice_factors(coverage, {key: self._factors[key] for key in self._trained}, rank)

    def side(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of what was made of text."""
        made = {key: self._factors[key] for key in self._factors if is_whitened(key, self._start.shape)}
        return slice_factors(coverage, made, rank) if self.whitened is not None else {}

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of all factors."""
        return slice_factors(coverage, self._factors, rank)

    def add(self, change: Change, coverage: Coverage) -> None:
        """N += n Δ and D += n c, at the entries that the block holds."""
        n = float(change.examples)
        self._round.add(coverage, change.rank, n)
        self._examples += n
        placement = Placement.of(coverage)
        if isinstance(change.delta, Flat) and placement.whole and change.rank == self._start.rank:
            # The whole LLM's change lies as the sums do: one addition.
            for at in range(0, len(self._buffer), PIECE):
                self._buffer[at : at + PIECE].add_(change.delta.flat[at : at + PIECE], alpha=n)
            return
        for key, delta in change.delta.items():
            placement.add(key, self._sum[key], delta, n)

    def disturb(self, noise: Callable[[Sequence[int]], Tensor]) -> None:
        """N += noise; what of it is where nobody trained goes nowhere."""
        for tensor in self._sum.values():
            tensor += noise(tensor.shape)

    def only(self, entries: Tensors) -> None:
        """To the others nobody's training counts."""
        self._known = entries

    def finish(self) -> None:
        """θ + step(N / D) where somebody trained; elsewhere θ."""
        for key in self._trained if self._examples else ():
            weight = self._round.of(key, self._factors[key])
            trained = weight > 0 if self._known is None else (weight > 0) & self._known[key]
            d = weight if self._denominator == "coverage_mean" else self._examples
            gradient = torch.where(trained, self._sum[key] / d, 0.0)
            change = self._optimizer.step(key, gradient, trained)
            self._factors[key] = (self._factors[key].double() + change).float()
        self._round, self._examples = EntryWeight(self._start.shape, self._start.rank), 0.0
        self._known = None
        self._buffer.zero_()

    def state(self) -> Tensors:
        """Factors by key; the optimizer's moments."""
        return self._factors | self._optimizer.state()
