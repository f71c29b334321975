"""Changes as whole numbers whose sum over all holders fits a word, and back.

An entry of a change Δ with weight w is q = ⌊w Δ / s + u⌋, u uniform in [0, 1): its mean is w Δ / s (stochastic
rounding: Gupta et al., arXiv 1502.02551). It is limited to ± Q, Q = ⌊(2^15 - 1) / holders⌋. The step is s = b / Q
with a bound b of its rank row. What rounding and limit lose, a client adds to its next change.
"""

from __future__ import annotations

import numpy as np

WORD, LONG_WORD = 16, 32
MOST_HOLDERS = 257
"""Of an atom, for 16 bits: more would have fewer than 255 steps each."""
MARGIN = 4.0
"""The bound of a rank row over the largest entry of the last mean of as many entries that add up by chance."""
SHRINKS = 16.0
"""A bound is never less than this part of what training can move an entry by."""


def bits_for(holders: int) -> int:
    """Of a word, where no atom has more holders."""
    return WORD if holders <= MOST_HOLDERS else LONG_WORD


def quantum_range(holders: int, bits: int) -> int:
    """Q: so many holders' numbers within ± Q have a sum that fits a signed word; at most what float32 tells apart."""
    return min(((1 << (bits - 1)) - 1) // holders, 1 << 23)


def quantize(values: np.ndarray, step: np.ndarray, most: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Whole numbers (int32) for these changes; all vectors (n,), float32, `most` is Q.

    `draws` rounds up or down, up with the probability of what is left.
    """
    found = values / step
    found += draws.random(len(values), dtype=np.float32)
    np.floor(found, out=found)
    np.clip(found, -most, most, out=found)
    numbers: np.ndarray = found.astype(np.int32)
    return numbers


def to_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers modulo 2^bits."""
    return numbers.astype(f"<u{bits // 8}")


def from_words(words: np.ndarray) -> np.ndarray:
    """The whole numbers (int64) that fit a signed word."""
    numbers: np.ndarray = words.view(f"<i{words.itemsize}").astype(np.int64)
    return numbers


def bounds(last: np.ndarray, holders: int, moved: float) -> np.ndarray:
    """b of each rank row, float32: from the largest entries `last` of the last mean there (0: none is known).

    The mean of m entries of either sign is a √m-th of one. `moved` is what training can move an entry by.
    """
    least = moved / (SHRINKS if last.any() else 1.0)
    found: np.ndarray = np.maximum(MARGIN * holders**0.5 * last, least).astype(np.float32)
    return found
