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


def points(own: Collection[str]) -> list[Weights]:
    """Those that a client can take which has these parts beside the global update."""
    return [weights for weights in POINTS if set(weights) <= {"global", *own}]


def choose(found: Sequence[Mixture], own_only: bool = False) -> Mixture:
    """The first, and so the best on the others' data, that is within one standard error of the best one.

    The one-standard-error rule (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3): what the
    client's few validation rows cannot tell apart is decided in favour of the others. Where these get another model
    (`own_only`) there is nothing to decide for them, and it is the best one.
    """
    best = min(found, key=lambda one: one.validation)
    most = best.validation + (0.0 if own_only else best.stderr or 0.0)
    return next(one for one in found if one.validation <= most)
