"""What a client ends with: the mixture in weight space that its own validation data choose."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from legolm.runs import Mixture, Weights

POINTS: tuple[Weights, ...] = (
    {"global": 1.0},
    {"global": 3 / 4, "local": 1 / 4},
    {"global": 1 / 2, "personal": 1 / 2},
    {"global": 1 / 2, "local": 1 / 2},
    {"global": 1 / 3, "personal": 1 / 3, "local": 1 / 3},
    {"personal": 1.0},
    {"personal": 1 / 2, "local": 1 / 2},
    {"local": 1.0},
)
"""In the order of what they cost on the other clients' data, the cheapest first (a trial with eight languages)."""
TOLERANCE = 0.05
"""Share of the lowest loss that a client gives for a point that is better on the others' data."""


def points(own: Collection[str]) -> list[Weights]:
    """Those that a client can take which has these parts beside the global update."""
    return [weights for weights in POINTS if set(weights) <= {"global", *own}]


def choose(found: Sequence[Mixture]) -> Mixture:
    """The first, and so the best on the others' data, that is nearly as good as the best one and no worse than alone.

    The client's few validation rows tell points apart to a few percent only, and what they cannot tell is decided in
    favour of the others.
    """
    most = (1 + TOLERANCE) * min(one.validation for one in found)
    most = min([most, *(one.validation for one in found if set(one.weights) == {"local"})])
    return next(one for one in found if one.validation <= most)
