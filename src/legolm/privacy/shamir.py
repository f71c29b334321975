"""Shamir's secret sharing over a prime field (A. Shamir, How to share a secret, CACM 22(11), 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence

from legolm.errors import PublicError

PRIME = 2**256 + 297
"""The smallest prime above all secrets of 32 bytes."""
SHARE_BYTES = 33


def share(secret: int, points: Sequence[int], threshold: int, prime: int = PRIME) -> dict[int, int]:
    """Shares by point of a secret below `prime`: any `threshold` of them give it, and fewer tell nothing of it.

    Points are distinct, from 1 to `prime` - 1.
    """
    return evaluate([secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))], points, prime)


def evaluate(coefficients: Sequence[int], points: Iterable[int], prime: int = PRIME) -> dict[int, int]:
    """The polynomial with these coefficients, the constant first, at each point."""
    found = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % prime
        found[point] = value
    return found


def weights(points: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    """Lagrange's weights at 0: what each point's share counts in the secret."""
    found = {}
    for one in points:
        above, below = 1, 1
        for other in points:
            if other != one:
                above = above * other % prime
                below = below * (other - one) % prime
        found[one] = above * pow(below, -1, prime) % prime
    return found


def reconstruct(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """The secret of at least a threshold of shares by point; of wrong ones another number."""
    counts = weights(list(shares), prime)
    return sum(counts[point] * value for point, value in shares.items()) % prime


def to_bytes(value: int) -> bytes:
    """A share as `SHARE_BYTES` bytes."""
    return value.to_bytes(SHARE_BYTES, "big")


def from_bytes(content: bytes) -> int:
    """What `to_bytes` wrote. Raises `LegolmError` for what is in no field."""
    value = int.from_bytes(content, "big")
    if len(content) != SHARE_BYTES or value >= PRIME:
        raise PublicError("a share is none of the field's numbers")
    return value
