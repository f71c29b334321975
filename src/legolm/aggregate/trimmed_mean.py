"""Coordinate-wise trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498) over the clients that hold the coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from legolm.aggregate.robust import Robust
from legolm.aggregate.scheme import scheme


@scheme("trimmed_mean")
class TrimmedMean(Robust):
    """Of c holders the floor(trim · c) smallest and as many of the largest are left out."""

    def statistic(self, changes: Tensor) -> Tensor:
        """NaN where nobody holds the coordinate."""
        ordered = changes.sort(dim=0).values  # NaN last
        holders = (~ordered.isnan()).sum(0)
        cut = (self._config.trim * holders).floor()
        place = torch.arange(len(ordered)).view(-1, 1, 1)
        inside = (place >= cut) & (place < holders - cut)
        return torch.where(inside, ordered, 0.0).sum(0) / inside.sum(0)
