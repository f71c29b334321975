"""FedAvg (McMahan et al., arXiv 1602.05629) on LoRA factors, as FedIT does it (Zhang et al., arXiv 2305.05644), and
FedProx (Li et al., arXiv 1812.06127).

The mean of A and of B over clients, weighted by examples: the factor form where everyone covers everything, so D is
Σ n_k. All clients must hold the same shapes: in FedIT, the LLM.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from legolm.aggregate.factors import FactorSum
from legolm.aggregate.interface import Scheme, scheme


@scheme("fedavg")
def fedavg() -> Scheme:
    """No settings."""
    return FactorSum("coverage_mean", unequal="no")


@scheme("fedprox")
def fedprox(*, proximal: Annotated[float, Field(gt=0)] = 0.01) -> Scheme:
    """FedAvg whose clients add μ/2 · ‖θ − what they received‖² to their loss; `proximal` is μ."""
    return FactorSum("coverage_mean", unequal="no", proximal=proximal)
