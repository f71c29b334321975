"""Criteria for unstructured pruning: one typed function a file, registered by `@criterion`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from legolm.prune.calibrate import Moments, Needs

Prune = Callable[[Tensor, Moments | None, float], tuple[Tensor, Tensor]]
"""(weight (out, in), moments of its input, sparsity) -> (new weight, bool mask of kept weights)."""


@dataclass(frozen=True)
class Criterion:
    """A registered function and what it needs to know of the inputs."""

    prune: Prune
    needs: Needs


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, needs: Needs) -> Callable[[Prune], Prune]:
    """Register a criterion under the name that configs use."""

    def register(prune: Prune) -> Prune:
        CRITERIA[name] = Criterion(prune, needs)
        return prune

    return register


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask of the last dimension's largest scores: exactly round(sparsity · n) are dropped.

    Selection, not a threshold: `<=` on equal scores would drop more than asked.
    """
    drop = round(sparsity * scores.shape[-1])
    lowest = scores.topk(drop, dim=-1, largest=False, sorted=False).indices
    mask = scores.new_ones(scores.shape, dtype=torch.bool)
    return mask.scatter(-1, lowest, False)
