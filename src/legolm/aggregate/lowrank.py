"""Sums of products as stacked factors, and the best product of a given rank.

All in float64. A product of a (m, k) and a (k, n) factor costs k (m + n) numbers; past k = m n / (m + n) the dense
matrix is smaller, and sums go there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from legolm.adapter import Tensors, slice_factors
from legolm.block import Coverage

BATCH = 64
OVERSAMPLING = 8
POWER_ITERATIONS = 4
EASY = 1e-3
"""Pivots of Cholesky above this share of the largest: Q loses six of sixteen digits at most."""
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
            return svd_of_product(*self.stacked(), rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = min(rank + OVERSAMPLING, self.rows, self.cols)
            u, s, vt = torch.svd_lowrank(self.make_dense(), q=wanted, niter=POWER_ITERATIONS)
        kept = _kept(s, rank)
        return u[:, :kept], s[:kept], vt.T[:kept]

    def best_and_whole(self, rank: int) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`best`, and left and right factor of the whole sum: of its own rank, or the dense matrix and the identity."""
        if self._dense is None:
            u, s, v = svd_of_product(*self.stacked(), min(self.rows, self.cols))
            return (u[:, :rank], s[:rank], v[:rank]), (u * s, v)
        dense, one = self.make_dense(), torch.eye(min(self.rows, self.cols), dtype=torch.float64)
        return self.best(rank), ((dense, one) if self.cols <= self.rows else (one, dense))


def svd_of_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """First U, σ (descending), V of left (m, k) times right (k, n), without the product.

    Q and R of the shorter factor, then the eigenvectors of the k × k Gram matrix of (R · longer factor). Squaring costs
    digits: a singular value below 1e-7 of the largest is noise, and left out. R comes from Cholesky where the factor is
    well conditioned (a sixth of the time), else from Householder's QR.
    """
    if left.shape[0] > right.shape[1]:
        v, s, u = svd_of_product(right.T, left.T, rank)
        return u.T, s, v.T
    if left.shape[1] == 0:
        return left, torch.zeros(0, dtype=left.dtype), right
    lower, failed = torch.linalg.cholesky_ex(left.T @ left)
    pivots = lower.diagonal()
    easy = not bool(failed) and float(pivots.min()) > EASY * float(pivots.max())
    q, r = (left, lower.T) if easy else torch.linalg.qr(left)
    middle = r @ right
    squares, u = torch.linalg.eigh(middle @ middle.T)
    s = squares.clamp(min=0).sqrt().flip(0)
    kept = _kept(s, rank)
    s, u = s[:kept], u.flip(1)[:, :kept]
    v = (u.T @ middle) / s[:, None]
    return q @ (torch.linalg.solve_triangular(r, u, upper=True) if easy else u), s, v


def best_beside(left: Tensor, right: Tensor, known: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C (m, p), and U, σ, V of at most `rank`, so that C · known + U σ V is the best of its kind to left · right.

    `known` (p, n) are directions that are given (Golub, Hoffman and Stewart, A generalization of the
    Eckart-Young-Mirsky matrix approximation theorem, 1987): the projection on them, and the best of what is left.
    """
    shares = right @ torch.linalg.pinv(known)
    return left @ shares, *svd_of_product(left, right - shares @ known, rank)


def product_slice(coverage: Coverage, product: Tensors, like: Tensors) -> Tensors:
    """A block's slice of a product whose modules have ranks of their own, as one adapter of the largest of them.

    Its keys are those of `like`: what the product lacks is zero. Empty where it has no rank at all.
    """
    width = max((tensor.shape[1] for key, tensor in product.items() if key.endswith(".B")), default=0)
    whole: Tensors = {}
    for key, factor in like.items() if width else ():
        rows, cols = factor.shape
        whole[key] = torch.zeros((width, cols) if key.endswith(".A") else (rows, width))
        if key in product:
            found = product[key]
            whole[key][: found.shape[0], : found.shape[1]] = found
    return slice_factors(coverage, whole, width)


def frobenius(left: Tensor, right: Tensor) -> float:
    """‖left · right‖ from the small Gram matrices."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _kept(s: Tensor, rank: int) -> int:
    """How many of the descending singular values are there, at most `rank`."""
    return min(rank, int((s > NULL * s[0]).sum())) if len(s) and float(s[0]) > 0 else 0
