"""Coordinate-wise statistics under coverage: median, trimmed mean, and any function of the same form.

A coordinate's statistic is over the clients that hold it, so what it withstands depends on how many these are: a liar
who holds a coordinate alone decides it, and of two nobody can say who lies. They need all changes of the round at once:
memory grows with the clients.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from legolm.adapter import Change, Tensors
from legolm.aggregate.interface import Start, Statistics, scheme
from legolm.aggregate.one_adapter import OneAdapter
from legolm.aggregate.weight import Placement
from legolm.block import Coverage
from legolm.errors import LegolmError

LIE = 1e9


class Statistic(OneAdapter):
    """The scheme that a statistic makes: θ moves by η times the statistic of the changes."""

    def __init__(self, name: str, statistic: Statistics) -> None:
        super().__init__(
            lambda start, factors: _Round(name, statistic, start), unequal="block", dense=False, streams=False
        )
        self._statistic = statistic

    def weighs(self) -> bool:
        """Tried: three clients with other changes, first of the same weight."""
        changes = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64).view(3, 1, 1)
        alike, other = (torch.tensor(weight, dtype=torch.float64) for weight in ([1, 1, 1], [1, 2, 100]))
        return float(self._statistic(changes, alike)) != float(self._statistic(changes, other))

    def outvoted(self, holders: int) -> int:
        """Tried: honest clients change a coordinate by 0 and liars by 1e9, more and more of them until it moves."""
        for liars in range(1, holders + 1):
            changes = torch.zeros(holders, 1, 1, dtype=torch.float64)
            changes[:liars] = LIE
            if not abs(float(self._statistic(changes, torch.ones(holders, dtype=torch.float64)))) < 1:
                return liars - 1
        return holders


class _Round:
    """Holds the round's changes."""

    def __init__(self, name: str, statistic: Statistics, start: Start) -> None:
        self._name, self._statistic = name, statistic
        self._eta = start.server.eta
        self._changes: list[tuple[Change, Coverage]] = []

    def add(self, change: Change, coverage: Coverage) -> None:
        """Keep it."""
        self._changes.append((change, coverage))

    def result(self, factors: Tensors) -> Tensors:
        """θ + η · statistic where somebody trained; elsewhere θ."""
        found = dict(factors)
        for key, theta in factors.items():
            held = [(change, coverage) for change, coverage in self._changes if key in change.delta]
            if held:
                stacked = torch.stack([spread(key, theta, *one) for one in held])
                weight = torch.tensor([change.examples for change, _ in held], dtype=torch.float64)
                moved = self._checked(key, self._statistic(stacked, weight), stacked)
                found[key] = theta + (self._eta * moved.nan_to_num(nan=0.0)).float()
        return found

    def _checked(self, key: str, value: Tensor, spread: Tensor) -> Tensor:
        """Raise `LegolmError` unless it is a finite number wherever a client holds something."""
        where = f"aggregate.scheme {self._name!r}"
        if not isinstance(value, Tensor) or value.shape != spread.shape[1:]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LegolmError(
                f"{where}: gave {shape} for {key}; of changes (clients, rows, columns) it must give (rows, columns), "
                f"{tuple(spread.shape[1:])}"
            )
        held = ~spread.isnan().all(0)
        if not bool(value[held].isfinite().all()):
            raise LegolmError(
                f"{where}: gave a number that is not finite for {key} where clients hold something; NaN in changes "
                "marks what one client lacks: leave those out (torch.nanmean)"
            )
        return value.double()


def spread(key: str, like: Tensor, change: Change, coverage: Coverage) -> Tensor:
    """The change of one factor in the LLM's coordinates, NaN where the block has none."""
    placement = Placement.of(coverage)
    value, held = (torch.zeros_like(like, dtype=torch.float64) for _ in range(2))
    placement.add(key, value, change.delta[key], 1.0)
    placement.add(key, held, torch.ones_like(change.delta[key]), 1.0)
    return torch.where(held > 0, value, torch.nan)


@scheme("median")
def median(changes: Tensor, weight: Tensor) -> Tensor:
    """Coordinate-wise median (Yin et al., ICML 2018, arXiv 1803.01498): the middle value, or the mean of both.

    Each client counts the same: a liar must not choose its weight. NaN where nobody holds the coordinate.
    """
    return changes.nanquantile(0.5, dim=0)


@scheme("trimmed_mean")
def trimmed_mean(changes: Tensor, weight: Tensor, *, trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2) -> Tensor:
    """Coordinate-wise trimmed mean (as above): of c holders the floor(trim · c) smallest and largest are left out.

    From three holders on at least one at each end, unless `trim` is 0: few hold a coordinate under coverage, and the
    floor alone would trim nothing at up to four.
    """
    ordered = changes.sort(dim=0).values  # NaN last
    holders = (~ordered.isnan()).sum(0)
    cut = (trim * holders).floor()
    if trim:
        cut = torch.where(holders >= 3, cut.clamp(min=1), cut)
    place = torch.arange(len(ordered)).view(-1, 1, 1)
    inside = (place >= cut) & (place < holders - cut)
    return torch.where(inside, ordered, 0.0).sum(0) / inside.sum(0)
