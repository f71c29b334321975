"""Whole numbers for changes, and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.privacy import Scale, bits_for, bounds, noisy, quantize, quantum_range, to_words
from legolm.privacy.numbers import from_words


def test_ranges_by_hand() -> None:
    assert [quantum_range(m, 16) for m in (3, 8, 257)] == [10922, 4095, 127]
    assert [bits_for(m) for m in (257, 258)] == [16, 32]
    assert quantum_range(300, 32) == 7158278


@given(st.integers(3, 400), st.integers(0, 2**32 - 1))
def test_the_largest_sums_fit_a_word(holders: int, seed: int) -> None:
    bits, signs = bits_for(holders), np.random.default_rng(seed).choice([-1, 1], (holders, 4))
    numbers = (quantum_range(holders, bits) * np.vstack([signs, np.ones_like(signs)])[:holders]).astype(np.int32)
    words = to_words(numbers[0], bits)
    for one in numbers[1:]:
        words += to_words(one, bits)
    assert (from_words(words) == numbers.astype(np.int64).sum(0)).all()


def test_rounding_is_right_on_average_and_limited() -> None:
    values = np.repeat(np.float32([0.25, -0.25, 3.0, 7.9, -8.4]), 20_000)
    step, most = np.full_like(values, 0.5), np.full_like(values, 10)
    found = quantize(values, Scale(step, most), np.random.default_rng(0)).reshape(5, -1)
    assert found.mean(1) == pytest.approx([0.5, -0.5, 6, 10, -10], abs=0.02)
    assert set(found[0].tolist()) == {0, 1}
    assert set(found[2].tolist()) == {6}


def test_bounds_follow_the_last_mean() -> None:
    moved = np.array([0.5, 0.25])
    assert bounds(np.zeros(2), 4, moved).tolist() == [0.5, 0.25]  # nothing is known yet
    assert bounds(np.array([0.25, 0.0]), 4, moved).tolist() == [2.0, 0.015625]  # 4 √4 0.25; a sixteenth


@settings(max_examples=30)
@given(
    st.integers(3, 257),
    st.floats(1e-6, 1),
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_without_noise_and_limit_a_sum_is_the_plain_one(
    holders: int, bound: float, values: list[float], seed: int
) -> None:
    """To a step for each holder: those of next to no noise are as fine as those without."""
    change, most = np.float32(values) * np.float32(bound), np.full(len(values), quantum_range(holders, 16), np.float32)
    plain = Scale(np.float32(bound) / most, most)
    quiet = noisy(np.full(len(values), bound), most, np.float64(holders), np.zeros(len(values)))
    found = np.zeros(len(values))
    for number in range(holders):
        draws = [np.random.default_rng(seed + number) for _ in range(2)]
        found += plain.step * quantize(change, plain, draws[0])
        found -= quiet.step * quantize(change, quiet, draws[1], np.zeros(len(values)))
    assert (np.abs(found) <= 2.5 * holders * plain.step).all()


def test_steps_with_noise_by_hand() -> None:
    """Four holders: ± 2 of a change, and eight deviations of the sum's noise, 8 · 4 · √4 = 64 for all, 16 for each."""
    scale = noisy(np.array([2.0]), np.array([8191.0]), np.array([4.0]), np.array([4.0]))
    assert scale.step == pytest.approx(18 / 8191)
    assert scale.most * scale.step == pytest.approx(2)
    assert scale.noise == pytest.approx(4)
    least = noisy(np.array([2.0]), np.array([8191.0]), np.array([4.0]), np.array([0.0]))
    assert least.noise == pytest.approx(4 * 2 / 8191)
    assert least.noise / least.step > 3.9


def test_noise_is_rounded_as_it_is_and_not_limited() -> None:
    """To the variance of noise of 5 steps the rounding of something spread evenly adds a sixth: ∫ f (1 - f) df."""
    scale = Scale(np.full(200_000, 0.5), np.full(200_000, 2.0), np.full(200_000, 2.5))
    noise = 2.5 * np.random.default_rng(1).standard_normal(200_000)
    found = quantize(np.full(200_000, 9.0, np.float32), scale, np.random.default_rng(2), noise)
    assert found.mean() == pytest.approx(2, abs=0.05)  # 1 is the most that a change may be
    assert found.var() == pytest.approx(25 + 1 / 6, rel=0.02)
    assert found.max() > 20


@pytest.mark.parametrize(("sigma", "parts"), [(3.9, 2), (3.9, 3), (8.0, 2)])
@pytest.mark.parametrize("apart", [0.5, 0.7])
def test_rounding_after_noise_adds_nothing_to_the_sensitivity(sigma: float, parts: int, apart: float) -> None:
    """Of all sums that the server may see: δ at each ε is at most the Gaussian mechanism's, with the change as it was.

    A change of 0.7 deviations of the whole noise is no whole number of steps. Rounded before the noise is added it
    would be longer, and δ larger.
    """
    whole, reach = sigma * parts**0.5, np.arange(-400, 401)
    change = apart * whole + 0.3

    def sums(offsets: np.ndarray, first: float) -> np.ndarray:
        """How likely each sum of ⌊x + n + u⌋ is, where x is `first` for one part and 0 for the others."""
        found = np.ones(1)
        for place, offset in enumerate(offsets):
            edges = (np.append(reach, 401) - offset - (first if place == 0 else 0)) / sigma
            found = np.convolve(found, np.diff(normal(edges)))
        return found

    draws = np.random.default_rng(0).random((64, parts))
    with_it, without = (np.stack([sums(offsets, first) for offsets in draws]) for first in (change, 0.0))
    for epsilon in (0.1, 0.5, 1.0, 2.0):
        ours = np.maximum(with_it - np.exp(epsilon) * without, 0).sum(1).mean()
        assert ours <= gaussian_delta(epsilon, change / whole) * 1.002
        longer = gaussian_delta(epsilon, (change + 0.5) / whole)
        assert ours < longer


def normal(x: np.ndarray) -> np.ndarray:
    """Distribution function."""
    return 0.5 * np.vectorize(math.erfc)(-x / 2**0.5)


def gaussian_delta(epsilon: float, apart: float) -> float:
    """δ of the Gaussian mechanism whose two outputs are so many deviations apart (Balle and Wang 2018, theorem 8)."""
    one, two = normal(np.array([apart / 2 - epsilon / apart, -apart / 2 - epsilon / apart]))
    return float(one - math.exp(epsilon) * two)
