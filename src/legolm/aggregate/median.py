"""Coordinate-wise median (Yin et al., ICML 2018, arXiv 1803.01498) over the clients that hold the coordinate."""

from __future__ import annotations

from torch import Tensor

from legolm.aggregate.robust import Robust
from legolm.aggregate.scheme import scheme


@scheme("median")
class Median(Robust):
    """The middle value, or the mean of the two in the middle."""

    def statistic(self, changes: Tensor) -> Tensor:
        """NaN where nobody holds the coordinate."""
        return changes.nanquantile(0.5, dim=0)
