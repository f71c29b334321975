"""Coordinate-wise statistics under coverage: what trimmed mean and median share.

A coordinate's statistic is over the clients that hold it, each counting the same: a liar must not choose its weight.
They need all updates of the round at once: memory grows with the clients.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from legolm.adapter import Update
from legolm.aggregate.adapter import OneAdapter
from legolm.aggregate.weight import Placement
from legolm.block import Coverage


class Robust(OneAdapter):
    """Holds the round's updates; θ moves by η times the statistic of the changes."""

    streaming: ClassVar[bool] = False

    def add(self, update: Update, coverage: Coverage) -> None:
        """Keep the update."""
        self._updates.append((update, coverage))
        self._round.add(coverage, update.rank, float(update.examples))

    def _make(self) -> None:
        """θ + η · statistic where somebody trained; elsewhere θ."""
        for key, theta in self._factors.items():
            held = [(one, coverage) for one, coverage in self._updates if key in one.delta]
            if held:
                change = self.statistic(torch.stack([_spread(key, theta, *one) for one in held]))
                self._factors[key] = theta + (self._config.server_learning_rate * change.nan_to_num(nan=0.0)).float()

    @abstractmethod
    def statistic(self, changes: Tensor) -> Tensor:
        """Of (clients, rows, columns), float64, over the first dimension; NaN is a coordinate that a client lacks."""

    def _reset(self) -> None:
        super()._reset()
        self._updates: list[tuple[Update, Coverage]] = []


def _spread(key: str, like: Tensor, update: Update, coverage: Coverage) -> Tensor:
    """The update's change of one factor in the LLM's coordinates, NaN where the block has none."""
    placement = Placement.of(coverage)
    value, held = (torch.zeros_like(like, dtype=torch.float64) for _ in range(2))
    placement.add(key, value, update.delta[key], 1.0)
    placement.add(key, held, torch.ones_like(update.delta[key]), 1.0)
    return torch.where(held > 0, value, torch.nan)
