"""Multi-Krum (Blanchard et al., NeurIPS 2017, "Machine learning with adversaries") under coverage.

Of n changes, f of them thought hostile, the n − f whose n − f − 2 nearest others are the nearest are averaged.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from legolm.aggregate.interface import Scheme, scheme
from legolm.aggregate.nearest import Nearest, honest


@scheme("multi_krum")
def multi_krum(*, hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.25) -> Scheme:
    """`hostile` is the share of clients that may lie: f = ⌊hostile · n⌋."""

    def vote(distance: Tensor) -> Tensor:
        count = len(distance)
        left = honest(count, hostile)
        # Without the zero to itself.
        score = distance.sort(1).values[:, 1 : max(left - 1, 2)].sum(1)
        chosen = torch.zeros(1, count, dtype=torch.bool)
        chosen[0, score.argsort(stable=True)[:left]] = True
        return chosen

    return Nearest(vote, lambda votes: votes[0])
