"""Nearest-neighbour mixing (Allouah et al., AISTATS 2023, arXiv 2302.01772) before the median, under coverage.

Each client's change becomes the mean of the n − f nearest to it, itself among them, and of these the coordinate-wise
median is taken: honest changes come nearer to each other before a liar's distance from them counts.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from legolm.aggregate.interface import Scheme, scheme
from legolm.aggregate.nearest import Nearest, closest, honest


@scheme("nearest_mixing")
def nearest_mixing(*, hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.25) -> Scheme:
    """`hostile` is the share of clients that may lie: f = ⌊hostile · n⌋."""
    return Nearest(
        lambda distance: closest(distance, honest(len(distance), hostile)),
        lambda votes: votes.nanquantile(0.5, dim=0),
    )
