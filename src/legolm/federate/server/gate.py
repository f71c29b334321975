"""The gate before the aggregation: an update passes as it is, smaller, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import torch

from legolm.adapter import Change, Flat
from legolm.config import OutlierConfig
from legolm.federate.server.dispatch import Trained
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


def passed(one: Trained, usual: float | None, outliers: OutlierConfig) -> Trained:
    """What came back, its update scaled down or refused (with the reason) when too large for the earlier rounds'.

    Its size is recorded as it is added.
    """
    if one.update is None:
        return one
    change, size = one.update.change, size_of(one.update.change)
    if outliers.action != "none" and usual and size > outliers.factor * usual:
        if outliers.action == "refuse":
            reason = f"size {size:.3g} is {size / usual:.1f} times the median of earlier rounds, {usual:.3g}"
            return replace(one, update=None, reason=reason)
        share = outliers.factor * usual / size
        change = replace(change, delta={key: tensor * share for key, tensor in change.delta.items()})
        size = size_of(change)
    training = one.update.training.model_copy(update={"size": size})
    return replace(one, update=replace(one.update, change=change, training=training))
