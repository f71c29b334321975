"""Criteria for unstructured pruning: one typed function a file, registered by `@criterion`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from legolm.prune.calibrate import Moments, Needs


@dataclass(frozen=True)
class Pattern:
    """Which weights compete with which, and the share of them that is dropped.

    `group` is the M of an N:M pattern: in each run of M weights of a row exactly round(sparsity · M) are dropped.
    Without it a criterion decides over whole matrices or rows.
    """

    sparsity: float
    group: int | None = None

    def keep(self, scores: Tensor, over: Literal["matrix", "row"]) -> Tensor:
        """Bool mask of the largest scores (rows, columns)."""
        if self.group is not None:
            groups = scores.reshape(len(scores), -1, self.group)
            return keep_largest(groups, self.sparsity).view_as(scores)
        if over == "matrix":
            return keep_largest(scores.flatten(), self.sparsity).view_as(scores)
        return keep_largest(scores, self.sparsity)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask of the last dimension's largest scores: exactly round(sparsity · n) are dropped.

    Selection, not a threshold: `<=` on equal scores would drop more than asked.
    """
    drop = round(sparsity * scores.shape[-1])
    lowest = scores.topk(drop, dim=-1, largest=False, sorted=False).indices
    mask = scores.new_ones(scores.shape, dtype=torch.bool)
    return mask.scatter(-1, lowest, False)


Prune = Callable[[Tensor, Moments | None, Pattern], tuple[Tensor, Tensor]]
"""(weight (out, in), moments of its input, pattern) -> (new weight, bool mask of kept weights)."""


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
