"""Wanda (Sun et al., arXiv 2306.11695): drop the smallest |w| · ‖x‖ of each output row."""

from __future__ import annotations

from torch import Tensor

from legolm.prune.moments import Moments
from legolm.prune.registry import Pattern, criterion


@criterion("wanda", needs="diagonal")
def wanda(weight: Tensor, moments: Moments | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Equation 1 of the paper, compared within each output row; no weight update."""
    assert moments is not None
    mask = pattern.keep(weight.abs() * moments.mean_square.sqrt(), over="row")
    return weight * mask, mask
