"""The gate before the aggregation, a chain: an update passes as it is, smaller, or not at all.

Whatever the scheme, and nothing behind the gate knows what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median

import torch

from legolm.adapter import Change, Flat
from legolm.config import DpConfig, OutlierConfig, RunConfig
from legolm.federate.server.dispatch import Trained
from legolm.privacy import clipped
from legolm.runs import RoundRecord


def usual_size(rounds: Iterable[RoundRecord]) -> float | None:
    """The median size of all updates so far; None without any."""
    sizes = [one.size for record in rounds for one in record.train.values() if one.size is not None]
    return median(sizes) if sizes else None


def size_of(change: Change) -> float:
    """Root mean square of the change: comparable between blocks."""
    parts = [change.delta.flat] if isinstance(change.delta, Flat) else list(change.delta.values())
    total = sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)
    return math.sqrt(total / sum(part.numel() for part in parts))


def passed(one: Trained, usual: float | None, config: RunConfig) -> Trained:
    """What came back after each link of the chain, or refused, with the reason. Its size is recorded as it is added.

    `usual` is the size of earlier rounds' updates.
    """
    if one.update is None:
        return one
    change = one.update.change
    for link in (_outliers(config.aggregate.outliers, usual), _clip(config.privacy.dp)):
        found = link(change)
        if isinstance(found, str):
            return replace(one, update=None, reason=found)
        change = found
    training = one.update.training.model_copy(update={"size": size_of(change)})
    return replace(one, update=replace(one.update, change=change, training=training))


Link = Callable[[Change], Change | str]
"""A change as it goes on, or why it does not."""


def _outliers(outliers: OutlierConfig, usual: float | None) -> Link:
    """Too large for the earlier rounds': smaller, or refused."""

    def link(change: Change) -> Change | str:
        size = size_of(change)
        if outliers.action == "none" or not usual or size <= outliers.factor * usual:
            return change
        if outliers.action == "refuse":
            return f"size {size:.3g} is {size / usual:.1f} times the median of earlier rounds, {usual:.3g}"
        share = outliers.factor * usual / size
        return replace(change, delta={key: tensor * share for key, tensor in change.delta.items()})

    return link


def _clip(dp: DpConfig) -> Link:
    """To the bound that the server's noise is for. Who adds the noise itself has clipped before."""

    def link(change: Change) -> Change:
        if dp.level != "client" or dp.noise != "central":
            return change
        return replace(change, delta=clipped(change.delta, dp.clip))

    return link
