"""What a client ends with: the mixture in weight space that its own validation data choose."""

from __future__ import annotations

import math
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


AWAY, COST = 0.02, 0.01
"""Share of a client's own questions that the global update may answer, at most; and what that may cost of the loss on
own questions."""


def points(own: Collection[str]) -> list[Weights]:
    """Those that a client can take which has these parts beside the global update."""
    return [weights for weights in POINTS if set(weights) <= {"global", *own}]


def choose(found: Sequence[Mixture]) -> Mixture:
    """The first, and so the best on the others' data, that is within one standard error of the best one.

    The one-standard-error rule (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3): what the
    client's few validation rows cannot tell apart is decided in favour of the others.
    """
    best = min(found, key=lambda one: one.validation)
    return next(one for one in found if one.validation <= best.validation + (best.stderr or 0.0))


def choose_own(found: Sequence[Mixture]) -> Mixture:
    """For a model that the others' questions do not get: the best one, unless chance may have made it better than what
    the client learned alone, by no more than the standard error of the difference."""
    best = min(found, key=lambda one: one.validation)
    alone = next((one for one in found if one.weights == {"local": 1.0}), best)
    chance = math.hypot(best.stderr or 0.0, alone.stderr or 0.0)
    return best if best.validation < alone.validation - chance else alone


def let_go(found: Sequence[Mixture]) -> float:
    """Share of a client's own questions that may go to the global update, so that others' rather go there than not.

    `AWAY`, or less where that costs more than the share `COST` of the client's loss on its own validation data.
    """
    own = choose_own(found).validation
    shared = next(one.validation for one in found if one.weights == {"global": 1.0})
    lost = shared - own
    return AWAY if AWAY * lost <= COST * own else COST * own / lost
