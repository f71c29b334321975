"""Magnitude pruning (Han et al., arXiv 1506.02626): drop the smallest |w| of each matrix."""

from __future__ import annotations

from torch import Tensor

from legolm.prune.calibrate import Moments
from legolm.prune.registry import criterion, keep_largest


@criterion("magnitude", needs="nothing")
def prune(weight: Tensor, moments: Moments | None, sparsity: float) -> tuple[Tensor, Tensor]:
    """Keep the largest |w| of the whole matrix."""
    mask = keep_largest(weight.abs().flatten(), sparsity).view_as(weight)
    return weight * mask, mask
