"""Criteria for unstructured pruning: one typed function a file, registered by `@criterion`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from legolm.config import CRITERIA, BlockConfig, Entry, guarded
from legolm.errors import LegolmError
from legolm.prune.moments import Moments, Needs


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
    """A chosen function and what it needs to know of the inputs."""

    name: str
    function: Prune
    needs: Needs

    def prune(self, weight: Tensor, moments: Moments | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The function's answer. Raises `LegolmError` for one that cannot be a pruned matrix."""
        answer: Any = self.function(weight, moments, pattern)
        wanted = f"criterion {self.name!r}: of a weight {tuple(weight.shape)} it must give (new weight, bool mask)"
        if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(one, Tensor) for one in answer)):
            raise LegolmError(f"{wanted}; it gave a {type(answer).__name__}")
        pruned, mask = answer
        if not pruned.shape == weight.shape == mask.shape or mask.dtype != torch.bool:
            raise LegolmError(
                f"{wanted} of its shape; it gave {tuple(pruned.shape)} and a mask {tuple(mask.shape)} of {mask.dtype}"
            )
        if bool(weight.isfinite().all()) and not bool((pruned.isfinite() & (mask | (pruned == 0))).all()):
            raise LegolmError(f"{wanted}, finite and zero where the mask is False; it did not")
        if pattern.group is not None:
            kept = int(mask.view(len(mask), -1, pattern.group).sum(-1).max())
            most = pattern.group - round(pattern.sparsity * pattern.group)
            if kept > most:
                raise LegolmError(f"{wanted} that keeps {most} of each {pattern.group} in a row; it kept {kept}")
        return pruned, mask

    def rehearse(self, pattern: Pattern) -> None:
        """Prune a small random matrix. Raises `LegolmError` as `prune` does."""
        generator = torch.Generator().manual_seed(0)
        columns = 2 * (pattern.group or 8)
        moments = None if self.needs == "nothing" else Moments(columns, self.needs)
        if moments is not None:
            moments.add(torch.randn(4 * columns, columns, generator=generator))
        self.prune(torch.randn(8, columns, generator=generator), moments, pattern)


def criterion(name: str, needs: Needs) -> Callable[[Callable[..., tuple[Tensor, Tensor]]], Entry[Criterion]]:
    """Register a criterion under the name that configs use: `f(weight, moments, pattern, *, own settings)`.

    `needs` is what of the inputs' moments it reads. Raises `LegolmError` for a taken name and for another signature.
    """
    if needs not in get_args(Needs):
        raise LegolmError(f"criterion {name!r}: needs is {needs!r}; it must be one of {', '.join(get_args(Needs))}")

    def register(function: Callable[..., tuple[Tensor, Tensor]]) -> Entry[Criterion]:
        def make(**settings: Any) -> Criterion:
            return Criterion(name, partial(guarded(f"criterion {name!r}", function), **settings), needs)

        return CRITERIA.register(name, function, make, ("weight", "moments", "pattern"))

    return register


def criterion_of(block: BlockConfig) -> Criterion | None:
    """The criterion that a block is cut by; None for other methods."""
    if not block.registered:
        return None
    made: Criterion = CRITERIA.entry(block.method).make(**block.settings)
    return made
