"""Two models that answered the same questions: the difference, its standard error, and a paired test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from legolm.evaluation.figure import Array, Figure, RatioFigure, spread

FLIPS = 2**14
"""Sign flips: all of them up to 14 questions that differ, beyond that so many at random."""


@dataclass(frozen=True)
class Comparison:
    """`difference` is the model's value minus the reference's; `p` is two-sided."""

    difference: float
    stderr: float | None
    p: float
    test: Literal["McNemar", "sign flips"]


def compare(model: Figure, reference: Figure) -> Comparison | None:
    """The model against the reference, question by question.

    None where they did not answer the same questions in the same units: other questions, another tokenizer (a loss per
    token is then per another token), or a figure of the harness that is no mean over questions.
    """
    if not isinstance(model, RatioFigure) or not isinstance(reference, RatioFigure):
        return None
    if model.questions != reference.questions or not np.array_equal(model.weights, reference.weights):
        return None
    difference, stderr = model.value - reference.value, spread(model.influence - reference.influence)
    if all(_is_right_or_wrong(figure) for figure in (model, reference)):
        gained = int(((model.sums == 1) & (reference.sums == 0)).sum())
        lost = int(((model.sums == 0) & (reference.sums == 1)).sum())
        return Comparison(difference, stderr, mcnemar(gained, lost), "McNemar")
    return Comparison(difference, stderr, sign_flips(model.sums - reference.sums), "sign flips")


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947): `gained` of gained + lost, a fair coin each.

    The sign-flip test of differences that are -1, 0 or 1, in closed form.
    """
    count = gained + lost
    term = tail = 1
    for k in range(min(gained, lost)):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**count))


def sign_flips(differences: Array) -> float:
    """Two-sided p of the sum of paired differences (count,) under random signs (Fisher's permutation test).

    If the models are alike, a question's difference is as likely to have the other sign. Exact up to 14 differences
    that are not zero; beyond, (hits + 1) / (`FLIPS` + 1) with a fixed seed, so never below 1 / (`FLIPS` + 1).
    """
    nonzero = differences[differences != 0]
    count = len(nonzero)
    if not count:
        return 1.0
    least = abs(nonzero.sum()) - 1e-12 * abs(nonzero).sum()  # sums that are equal but for rounding count as equal
    if 2**count <= FLIPS:
        signs = (np.arange(2**count)[:, None] >> np.arange(count) & 1) * 2 - 1
        return float((abs(signs @ nonzero) >= least).mean())
    random, hits = np.random.default_rng(0), 0
    rows = max(1, 2**20 // count)
    for start in range(0, FLIPS, rows):
        signs = random.integers(0, 2, (min(rows, FLIPS - start), count), dtype=np.int8) * 2 - 1
        hits += int((abs(signs @ nonzero) >= least).sum())
    return (hits + 1) / (FLIPS + 1)


def _is_right_or_wrong(figure: RatioFigure) -> bool:
    return bool((figure.weights == 1).all() and np.isin(figure.sums, (0, 1)).all())
