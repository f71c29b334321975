"""Whole numbers for changes, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legolm.privacy import bits_for, bounds, quantize, quantum_range, to_words
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
    found = quantize(values, step, most, np.random.default_rng(0)).reshape(5, -1)
    assert found.mean(1) == pytest.approx([0.5, -0.5, 6, 10, -10], abs=0.02)
    assert set(found[0].tolist()) == {0, 1}
    assert set(found[2].tolist()) == {6}


def test_bounds_follow_the_last_mean() -> None:
    assert bounds(np.zeros(2), 4, 0.5).tolist() == [0.5, 0.5]  # nothing is known yet
    assert bounds(np.array([0.25, 0.0]), 4, 0.5).tolist() == [2.0, 0.03125]  # 4 √4 0.25; a sixteenth
