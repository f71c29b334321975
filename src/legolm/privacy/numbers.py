"""Changes as whole numbers whose sum over all holders fits a word, and back.

An entry of a change Δ with weight w is q = ⌊w Δ / s + u⌋, u uniform in [0, 1): its mean is w Δ / s (stochastic
rounding: Gupta et al., arXiv 1502.02551). It is limited to ± Q, Q = ⌊(2^15 - 1) / holders⌋. The step is s = b / Q
with a bound b of its rank row. What rounding and limit lose, a client adds to its next change.

**With noise** q = ⌊(Δ + n) / s + u⌋: Δ limited to ± b, n normal of standard deviation σ, and no limit behind it. The
sum of m is right modulo 2^w, and what does not fit a word is what is done with the noisy sum, no less private. Rounding
after noise adds nothing to the sensitivity: q is j with the density of Δ/s + n/s + v, v uniform, at j + ½ - u. A sum of
such parts has the density of the sum of all Δ, n and v on a lattice of uniform offset, and that tells in the mean over
offsets what its density itself tells: the Gaussian mechanism's output and independent numbers. It is so up to what the
whole numbers of single parts show, exp(-2 π² (σ/s)² (m - 1) / m) (as in Kairouz et al., arXiv 2102.06387, of discrete
noise): below 1e-60 for two parts of σ ≥ 3.9 s. Rounded before the noise a change would be longer by up to s √d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WORD, LONG_WORD = 16, 32
MOST_HOLDERS = 257
"""Of an atom, for 16 bits: more would have fewer than 255 steps each."""
MARGIN = 4.0
"""The bound of a rank row over the largest entry of the last mean of as many entries that add up by chance."""
SHRINKS = 16.0
"""A bound is never less than this part of what training can move an entry by."""
REACH = 8.0
"""Standard deviations of the noise on a sum that a word has room for: one in 1e15 is longer."""
LEAST_NOISE = 4.0
"""Steps of a client's noise, at least, so that whole numbers do not show."""


def bits_for(holders: int) -> int:
    """Of a word, where no atom has more holders."""
    return WORD if holders <= MOST_HOLDERS else LONG_WORD


def quantum_range(holders: int, bits: int) -> int:
    """Q: so many holders' numbers within ± Q have a sum that fits a signed word; at most what float32 tells apart."""
    return min(((1 << (bits - 1)) - 1) // holders, 1 << 23)


@dataclass(frozen=True)
class Scale:
    """How entries become whole numbers, vectors (n,): their steps, and the most that a change itself may be, in steps.

    `noise` is the standard deviation of a client's part of the noise, if there is any.
    """

    step: np.ndarray
    most: np.ndarray
    noise: np.ndarray | None = None


def noisy(bound: np.ndarray, most: np.ndarray, holders: np.ndarray, part: np.ndarray) -> Scale:
    """Of changes within ± `bound` to which each of so many holders adds noise of the deviation `part`, at least.

    `most` is Q; all vectors (n,). The sum of the changes and `REACH` deviations of the sum's noise fit a word.
    """
    deviation = np.maximum(part, LEAST_NOISE * bound / most)
    step = (bound + REACH * deviation / np.sqrt(holders)) / most
    return Scale(step, bound / step, deviation)


def quantize(
    values: np.ndarray, scale: Scale, draws: np.random.Generator, noise: np.ndarray | None = None
) -> np.ndarray:
    """Whole numbers (int32) for these changes, float32 (n,), limited, and `noise` on them, if any.

    `draws` rounds up or down, up with the probability of what is left.
    """
    found = np.clip(values / scale.step, -scale.most, scale.most)
    if noise is not None:
        found += noise / scale.step
    found += draws.random(len(values), dtype=np.float32)
    np.floor(found, out=found)
    if noise is None:
        np.minimum(found, scale.most, out=found)  # beyond 2^22 the sum is rounded
    numbers: np.ndarray = found.astype(np.int32)
    return numbers


def to_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers modulo 2^bits."""
    return numbers.astype(f"<u{bits // 8}")


def from_words(words: np.ndarray) -> np.ndarray:
    """The whole numbers (int64) that fit a signed word."""
    numbers: np.ndarray = words.view(f"<i{words.itemsize}").astype(np.int64)
    return numbers


def bounds(last: np.ndarray, holders: int, moved: np.ndarray) -> np.ndarray:
    """b of each rank row, float32: from the largest entries `last` of the last mean there (0: none is known).

    The mean of m entries of either sign is a √m-th of one. `moved` is what training can move an entry of each by.
    """
    least = moved / (SHRINKS if last.any() else 1.0)
    found: np.ndarray = np.maximum(MARGIN * holders**0.5 * last, least).astype(np.float32)
    return found
