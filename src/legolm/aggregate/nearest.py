"""Schemes that compare whole changes with each other under coverage: what they share.

The distance of two changes is the mean square of their difference over the coordinates that *both* hold: with blocks no
two clients need hold the same. Who shares nothing with a client is as far from it as the farthest that does. A scheme
says by these distances whose changes are averaged into which votes; a vote has a coordinate where any of its members
holds it, and is the mean of those that do. So what a few hold is judged by what these few sent elsewhere, too.

All changes of the round are held at once, as for the coordinate-wise statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, tensors_hash
from legolm.aggregate.interface import Start
from legolm.aggregate.one_adapter import OneAdapter
from legolm.aggregate.robust import LIE, spread
from legolm.block import Coverage

Vote = Callable[[Tensor], Tensor]
"""Distances (clients, clients) float64 -> members (votes, clients) bool."""
Statistic = Callable[[Tensor], Tensor]
"""Votes (votes, rows, columns) float64, NaN where a vote has nothing -> (rows, columns)."""


class Nearest(OneAdapter):
    """θ moves by η times the statistic of the votes. Each client counts the same: a liar must not choose its weight."""

    def __init__(self, vote: Vote, statistic: Statistic) -> None:
        super().__init__(
            lambda start, factors: _Round(vote, statistic, start),
            unequal="block",
            dense=False,
            streams=False,
            weighs=False,
        )
        self._vote, self._statistic = vote, statistic

    def outvoted(self, holders: int) -> int:
        """Tried: that many clients hold all; honest ones change it by 0 and liars, who agree, by 1e9."""
        for liars in range(1, holders + 1):
            changes = torch.zeros(holders, 1, 1, dtype=torch.float64)
            changes[:liars] = LIE
            apart = (changes.view(-1, 1) - changes.view(1, -1)).square()
            if not abs(float(self._statistic(mixed(changes, self._vote(apart))))) < 1:
                return liars - 1
        return holders


class _Round:
    """Holds the round's changes."""

    def __init__(self, vote: Vote, statistic: Statistic, start: Start) -> None:
        self._vote, self._statistic, self._eta = vote, statistic, start.server.eta
        self._changes: list[tuple[Change, Coverage]] = []

    def add(self, change: Change, coverage: Coverage) -> None:
        """Keep it."""
        self._changes.append((change, coverage))

    def result(self, factors: Tensors) -> Tensors:
        """θ + η · statistic of the votes where somebody trained; elsewhere θ."""
        # Where distances are equal the order decides, and it must not be that of arrival.
        self._changes.sort(key=lambda one: (one[1].hash, one[0].rank, tensors_hash(dict(one[0].delta))))
        if not self._changes:
            return factors
        members, found = self._vote(self._distances(factors)), dict(factors)
        for key, theta in factors.items():
            if any(key in change.delta for change, _ in self._changes):
                moved = self._statistic(mixed(self._spread(key, theta), members))
                found[key] = theta + (self._eta * moved.nan_to_num(nan=0.0)).float()
        return found

    def _distances(self, factors: Tensors) -> Tensor:
        count = len(self._changes)
        squares, shared = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
        for key, theta in factors.items():
            if any(key in change.delta for change, _ in self._changes):
                values = self._spread(key, theta).flatten(1)
                held = (~values.isnan()).double()
                values = values.nan_to_num(nan=0.0)
                own = values.square() @ held.T
                squares += own + own.T - 2 * values @ values.T
                shared += held @ held.T
        known = shared > 0
        distance = squares.clamp(min=0) / shared.clamp(min=1)
        return torch.where(known, distance, distance[known].max()).fill_diagonal_(0)

    def _spread(self, key: str, theta: Tensor) -> Tensor:
        """(clients, rows, columns) in the LLM's coordinates, NaN where a client has none."""
        nothing = torch.full_like(theta, torch.nan, dtype=torch.float64)
        return torch.stack([spread(key, theta, *one) if key in one[0].delta else nothing for one in self._changes])


def mixed(changes: Tensor, members: Tensor) -> Tensor:
    """(votes, rows, columns): the mean over each vote's members that hold a coordinate, NaN without any."""
    held = (~changes.isnan()).double()
    who = members.double()
    total, count = (torch.einsum("vc,crk->vrk", who, one) for one in (changes.nan_to_num(nan=0.0), held))
    return torch.where(count > 0, total / count, torch.nan)


def closest(distance: Tensor, count: int) -> Tensor:
    """(clients, clients) bool: each one's `count` nearest, itself first."""
    found = torch.zeros_like(distance, dtype=torch.bool)
    own = distance.clone().fill_diagonal_(-1)
    return found.scatter_(1, own.argsort(dim=1, stable=True)[:, :count], True)


def honest(clients: int, hostile: float) -> int:
    """How many of so many clients are taken for honest."""
    return clients - math.floor(hostile * clients)
