"""Server optimizers on the pseudo-gradient N / D: FedAvgM (Hsu et al., arXiv 1909.06335), FedAdam and FedYogi (Reddi
et al., Adaptive Federated Optimization, arXiv 2003.00295, algorithm 2, without bias correction as there).

An entry's state steps only in rounds in which somebody trained it. The adaptive two divide by the size that a change
usually has, so that η is about what an entry moves by, and v begins at τ² (algorithm 2 has v ≥ τ²).
"""

from __future__ import annotations

import torch
from torch import Tensor

from legolm.adapter import Tensors, under_prefix, with_prefix
from legolm.config import ServerConfig


class ServerOptimizer:
    """First and second moments by factor key, float32; those of a scheme's `state`, if any."""

    def __init__(self, config: ServerConfig, state: Tensors) -> None:
        self._config = config
        self._first, self._second = under_prefix("first", state), under_prefix("second", state)

    def step(self, key: str, gradient: Tensor, trained: Tensor) -> Tensor:
        """The change of a factor; `gradient` is float64 and zero where `trained` (bool, broadcasts) is not."""
        kind, c = self._config.server_optimizer, self._config
        if kind == "none":
            return c.eta * gradient
        first = self._first.get(key, torch.zeros_like(gradient, dtype=torch.float32)).double()
        new = c.server_momentum * first + (1.0 if kind == "fedavgm" else 1 - c.server_momentum) * gradient
        self._first[key] = torch.where(trained, new, first).float()
        if kind == "fedavgm":
            return torch.where(trained, c.eta * new, 0.0)
        second = self._second.get(key, torch.full_like(gradient, c.server_tau**2)).double()
        square = gradient**2
        if kind == "fedadam":
            grown = c.server_beta2 * second + (1 - c.server_beta2) * square
        else:
            grown = second - (1 - c.server_beta2) * square * torch.sign(second - square)
        self._second[key] = torch.where(trained, grown, second).float()
        return torch.where(trained, c.eta * new / (grown.sqrt() + c.server_tau), 0.0)

    def state(self) -> Tensors:
        """Both moments."""
        return with_prefix("first", self._first) | with_prefix("second", self._second)
