"""Magnitude pruning (Han et al., arXiv 1506.02626): drop the smallest |w| of each matrix."""

from __future__ import annotations

from torch import Tensor

from legolm.prune.moments import Moments
from legolm.prune.registry import Pattern, criterion


@criterion("magnitude", needs="nothing")
def magnitude(weight: Tensor, moments: Moments | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Keep the largest |w| of the whole matrix, or of each group of an N:M pattern."""
    mask = pattern.keep(weight.abs(), over="matrix")
    return weight * mask, mask
