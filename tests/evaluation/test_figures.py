"""Standard errors and paired tests against formulas and enumerations written out."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legolm.evaluation import Figure, compare
from legolm.evaluation.figure import RatioFigure, ratio_figure
from legolm.evaluation.paired import FLIPS, mcnemar, sign_flips

SUMS = st.floats(-10, 10, allow_nan=False)
PAIRS = st.lists(st.tuples(SUMS, SUMS, st.integers(1, 9)), min_size=2, max_size=20)


def test_a_mean_and_its_standard_error_by_hand() -> None:
    # Squares of 2/3, 1/3, 1/3 sum to 2/3; over n (n - 1) = 6 that is 1/9.
    figure = ratio_figure([0, 1, 1], None, "")
    assert figure.value == pytest.approx(2 / 3)
    assert figure.stderr == pytest.approx(1 / 3)
    assert ratio_figure([1], None, "").stderr is None


@given(PAIRS)
def test_the_standard_error_is_the_ratio_estimators(rows: list[tuple[float, float, int]]) -> None:
    sums, weights, count = [row[0] for row in rows], [row[2] for row in rows], len(rows)
    figure = ratio_figure(sums, weights, "")
    ratio = sum(sums) / sum(weights)
    # Cochran's variance of a ratio: that of the residuals over n times the mean weight squared.
    residuals = [value - ratio * weight for value, weight in zip(sums, weights, strict=True)]
    variance = sum(one * one for one in residuals) / (count - 1) / count / fmean(weights) ** 2
    assert figure.value == pytest.approx(ratio)
    assert figure.stderr == pytest.approx(math.sqrt(variance))
    raised = ratio_figure(sums, weights, "", exponential=True)
    assert raised.value == pytest.approx(math.exp(ratio))
    assert raised.stderr == pytest.approx(math.exp(ratio) * math.sqrt(variance))


def test_tokens_of_one_answer_are_not_independent() -> None:
    # Ten answers of ten equal tokens are ten observations, not a hundred.
    losses = [10.0 * (i % 2) for i in range(10)]
    assert ratio_figure(losses, [10.0] * 10, "").stderr == pytest.approx(stdev([i % 2 for i in range(10)]) / 10**0.5)


@given(PAIRS)
def test_a_paired_difference_has_the_standard_error_of_its_differences(rows: list[tuple[float, float, int]]) -> None:
    model, other = (ratio_figure([row[side] for row in rows], None, "same") for side in (0, 1))
    differences = [row[0] - row[1] for row in rows]
    found = compare(model, other)
    assert found is not None
    assert found.difference == pytest.approx(fmean(differences))
    assert found.stderr == pytest.approx(stdev(differences) / len(rows) ** 0.5, abs=1e-12)
    back = compare(other, model)
    assert back is not None and back.p == found.p


@given(st.integers(0, 7), st.integers(0, 7))
def test_mcnemar_is_the_sign_flip_test_of_right_and_wrong(gained: int, lost: int) -> None:
    sums = [abs(sum(signs)) for signs in product((-1, 1), repeat=gained + lost)]
    expected = Fraction(sum(one >= abs(gained - lost) for one in sums), len(sums))
    assert mcnemar(gained, lost) == pytest.approx(float(expected))


def test_mcnemar_by_hand_and_of_many() -> None:
    # 1 against 5 of 6: both tails of 0 or 1 heads, 2 (1 + 6) / 64.
    assert mcnemar(1, 5) == mcnemar(5, 1) == 14 / 64
    assert mcnemar(0, 0) == mcnemar(500, 500) == 1
    assert mcnemar(0, 2000) < 1e-300


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_few_sign_flips_are_all_of_them(differences: list[int]) -> None:
    values = np.array(differences, dtype=np.float64) / 3
    sums = [abs(float(np.dot(signs, differences))) for signs in product((-1, 1), repeat=len(differences))]
    hits = sum(one >= abs(sum(differences)) for one in sums)
    assert sign_flips(values) == pytest.approx(hits / len(sums))


def test_many_sign_flips_come_near_all_of_them() -> None:
    differences = np.random.default_rng(1).normal(0.35, 1, 15)
    signs = np.array(list(product((-1, 1), repeat=15)))
    exact = float((abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)).mean())
    assert 0.01 < exact < 0.5
    found = sign_flips(differences)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / FLIPS))
    assert sign_flips(differences) == found
    assert sign_flips(np.ones(400)) == 1 / (FLIPS + 1)


def test_right_or_wrong_takes_mcnemar_and_losses_sign_flips() -> None:
    right, wrong = ratio_figure([1, 1, 0], None, "q"), ratio_figure([0, 0, 0], None, "q")
    found = compare(right, wrong)
    assert found is not None and (found.test, found.p) == ("McNemar", 0.5)
    losses = compare(ratio_figure([1, 2.5, 0], [1, 2, 1], "q"), ratio_figure([2, 3, 1], [1, 2, 1], "q"))
    assert losses is not None and (losses.test, losses.p) == ("sign flips", 0.25)


def test_only_the_same_questions_in_the_same_units_are_compared() -> None:
    figure = ratio_figure([1, 2], [3, 4], "q")
    assert compare(figure, ratio_figure([1, 2], [3, 4], "other")) is None
    assert compare(figure, ratio_figure([1, 2], [3, 5], "q")) is None  # another tokenizer
    assert compare(figure, Figure(0.5, 0.1, 2)) is None
    assert isinstance(figure, RatioFigure) and compare(figure, figure) is not None
