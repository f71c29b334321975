"""Sums of products as stacked factors, and the best product of a given rank.

All in float64. A product of a (m, k) and a (k, n) factor costs k (m + n) numbers; past k = m n / (m + n) the dense
matrix is smaller, and sums go there.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH = 64
OVERSAMPLING = 8
POWER_ITERATIONS = 4
NULL = 1e-7
"""A singular value below this share of the largest is none."""


class ProductSum:
    """Σ L_i R_i of shape (m, n): stacked factors, or one dense matrix once that is smaller."""

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._dense: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the stacked factors, not yet in the dense matrix."""
        return sum(left.shape[1] for left in self._left)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left (m, k) times right (k, n)."""
        self._left.append(left.double())
        self._right.append(right.double())
        # A dense matrix takes them in batches: one product of rank 64 is faster than eight of rank 8.
        limit = BATCH if self._dense is not None else self.rows * self.cols / (self.rows + self.cols)
        if self.rank > limit:
            self.make_dense()

    def absorb(self, other: ProductSum) -> None:
        """Add another sum of this shape."""
        if other._dense is None:
            self.add(*other.stacked())
        else:
            self.make_dense().add_(other.make_dense())

    def make_dense(self) -> Tensor:
        """Go on as a dense (m, n) matrix, and give it."""
        left, right = self.stacked()
        self._left, self._right = [], []
        if self._dense is None:
            self._dense = left @ right
        elif left.shape[1]:
            self._dense.addmm_(left, right)
        return self._dense

    def scale(self, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        """Multiply each row, or each column, by its number (shapes (m,) and (n,))."""
        if rows is not None:
            self._left = [left * rows[:, None] for left in self._left]
        if cols is not None:
            self._right = [right * cols for right in self._right]
        if self._dense is not None:
            self._dense.mul_(rows[:, None] if rows is not None else 1.0).mul_(cols if cols is not None else 1.0)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The factors (m, k) and (k, n) of what is not in the dense matrix."""
        left, right = torch.zeros(self.rows, 0, dtype=torch.float64), torch.zeros(0, self.cols, dtype=torch.float64)
        return torch.cat([left, *self._left], 1), torch.cat([right, *self._right], 0)

    def best(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), σ (k,) descending, V (k, n) of the best approximation of rank k ≤ `rank` (Eckart-Young).

        Exact to rounding for stacked factors (`svd_of_product`); randomized with power iterations (Halko et al., arXiv
        0909.4061) for a dense matrix.
        """
        if self._dense is None:
            u, s, v = svd_of_product(*self.stacked())
        else:
            self.make_dense()
            wanted = min(rank + OVERSAMPLING, self.rows, self.cols)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                u, s, vt = torch.svd_lowrank(self._dense, q=wanted, niter=POWER_ITERATIONS)
            v = vt.T
        kept = min(rank, _kept(s))
        return u[:, :kept], s[:kept], v[:kept]


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ (descending), V of left (m, k) times right (k, n), without the product.

    QR of the shorter factor, then the eigenvectors of the k × k Gram matrix of (R · longer factor). Squaring costs
    digits: a singular value below 1e-7 of the largest is noise, and `best` leaves it out.
    """
    if left.shape[0] > right.shape[1]:
        v, s, u = svd_of_product(right.T, left.T)
        return u.T, s, v.T
    if left.shape[1] == 0:
        return left, torch.zeros(0, dtype=left.dtype), right
    q, r = torch.linalg.qr(left)
    middle = r @ right
    squares, u = torch.linalg.eigh(middle @ middle.T)
    s, u = squares.clamp(min=0).sqrt().flip(0), u.flip(1)
    return q @ u, s, (u.T @ middle) / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def frobenius(left: Tensor, right: Tensor) -> float:
    """‖left · right‖ from the small Gram matrices."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _kept(s: Tensor) -> int:
    return int((s > NULL * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
