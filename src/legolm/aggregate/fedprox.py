"""FedProx (Li et al., arXiv 1812.06127): FedAvg whose clients add μ/2 · ‖θ − what they received‖² to their loss."""

from __future__ import annotations

from legolm.aggregate.fedavg import FedAvg
from legolm.aggregate.scheme import Start, scheme
from legolm.config import AggregateConfig


@scheme("fedprox")
class FedProx(FedAvg):
    """The server's side is FedAvg's."""

    def __init__(self, start: Start, config: AggregateConfig) -> None:
        super().__init__(start, config)
        self.proximal = config.proximal
