"""FedAvg (McMahan et al., arXiv 1602.05629) on LoRA factors, as FedIT does it (Zhang et al., arXiv 2305.05644).

The mean of A and of B over clients, weighted by examples. All clients must hold the same shapes: in FedIT, the LLM.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from legolm.aggregate.factors import FactorSum
from legolm.aggregate.scheme import scheme


@scheme("fedavg")
class FedAvg(FactorSum):
    """The factor form where everyone covers everything: D is Σ n_k."""

    unequal_shapes: ClassVar[Literal["no", "rank", "block"]] = "no"
