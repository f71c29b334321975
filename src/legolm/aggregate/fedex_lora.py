"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): FedAvg made exact by a residual in the base.

A and B are averaged, and what the product of means lacks of the mean of products is added to everyone's base:
ΔW_res = Σ p_k B_k A_k − B̄ Ā, of rank Σ r_k + r, shipped each round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from legolm.aggregate.folding import Folding, Weighted
from legolm.aggregate.interface import scheme


@scheme("fedex_lora")
class FedexLora(Folding):
    """Clients of one rank, as in the paper."""

    unequal = "no"

    def fold_rank(self, ranks: Sequence[int], rank: int) -> int:
        """All clients' products and the product of the means."""
        return sum(ranks) + rank

    def _next(self, name: str, clients: list[Weighted]) -> tuple[Tensor, Tensor]:
        eta = self._start.server.server_learning_rate
        old_a, old_b = (self._factors[f"{name}.{side}"].double() for side in "AB")
        a = (1 - eta) * old_a + eta * sum(share * a for share, _, a in clients)
        b = (1 - eta) * old_b + eta * sum(share * b for share, b, _ in clients)
        self._factors[f"{name}.A"], self._factors[f"{name}.B"] = a.float(), b.float()
        lefts, rights = [eta * share * b for share, b, _ in clients], [a for *_, a in clients]
        if eta != 1:
            lefts, rights = [*lefts, (1 - eta) * old_b], [*rights, old_a]
        return torch.cat([*lefts, -b], 1), torch.cat([*rights, a], 0)
