"""What a model has to beat before its figures say anything: one exact answer, and a guess that reads no question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from legolm.evaluation.figure import RatioFigure
from legolm.evaluation.harness import TaskFigures
from legolm.evaluation.questions import DATA, EXACT, LOSS

REPEATED = 2
"""Answers are labels where each is there this many times in the mean, and not all are one."""


def constant_guess(answers: Sequence[str]) -> tuple[float, float]:
    """What the best guess that reads no question has on these answers, which nobody knows before: (nats, exact).

    The label prior guesses each answer as often as it is wanted, -ln p(answer) nats an answer, summed; the share of the
    commonest is right.
    """
    counts, total = Counter(answers), len(answers)
    return sum(count * math.log(total / count) for count in counts.values()), max(counts.values()) / total


def warnings(found: Mapping[str, TaskFigures], answers: Sequence[str]) -> list[str]:
    """By model's name its figures, and the wanted answers: a sentence for each figure that a blind guess would have."""
    figures = {name: one[DATA] for name, one in found.items() if DATA in one}
    said = []
    if nothing := [name for name, one in figures.items() if one[EXACT].value == 0]:
        said.append(
            f"exact match is 0: no answer of {', '.join(nothing)} is right to the letter. A lower loss or perplexity "
            "alone does not say that a model answers; read the answers"
        )
    counts = Counter(answers)
    if not 1 < len(counts) <= len(answers) / REPEATED:
        return said
    nats, commonest = constant_guess(answers)
    for name, one in figures.items():
        loss, exact = one[LOSS], one[EXACT].value
        assert isinstance(loss, RatioFigure)
        prior = nats / float(loss.weights.sum())
        if loss.value >= prior:
            said.append(
                f"{name}: its answer loss {loss.value:.3f} does not beat the label prior's {prior:.3f} (guessing each "
                "answer as often as it is wanted, whatever the question)"
            )
        if 0 < exact <= commonest:
            said.append(
                f"{name}: its exact match {exact:.3f} does not beat the label prior's {commonest:.3f} (always the "
                "commonest answer)"
            )
    return said
