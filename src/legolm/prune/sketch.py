"""Second moments in few bytes: squares, and a sketch of the correlations.

A positive semidefinite R (d, d) is about (RΩ)(ΩᵀRΩ)⁺(RΩ)ᵀ for a random Ω (d, k): Nyström's approximation (Gittens and
Mahoney, arXiv 1303.1849; from a sketch, Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736). It is never more than R;
what it lacks of the diagonal, which is known, is put there, as if all that the sketch does not hold were independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from legolm.prune.moments import Moments

FLOOR = 1e-4
"""Of the largest eigenvalue of ΩᵀRΩ: smaller ones are bfloat16's rounding."""


def sketch(moments: Moments, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """The squares Σx² (d,) float32, and RΩ (d, `columns`) bfloat16 of x's correlations R, with the Ω of this seed."""
    whole = moments.sum.cpu()  # not every device has float64
    squares = whole.diagonal().clone()  # a view would keep all of it
    root = squares.double().sqrt().where(squares > 0, 1)  # an input that was always zero has no correlations
    omega = _directions(len(root), columns, seed)
    return squares, (whole.double() @ (omega / root[:, None]) / root[:, None]).bfloat16()


def restore(squares: Tensor, product: Tensor, tokens: int, seed: int) -> Moments:
    """The moments that `sketch` was of, about: positive semidefinite, with these squares on the diagonal.

    Raises `ValueError` for what is not finite, or no sum of squares.
    """
    if product.dtype != torch.bfloat16 or not bool(product.isfinite().all()):
        raise ValueError(f"a sketch that is not finite, or {product.dtype}")
    root = Moments.unpacked(squares, tokens, len(squares), "diagonal").sum.double().sqrt()
    features, columns = product.shape
    omega, known = _directions(features, columns, seed), product.double()
    values, vectors = torch.linalg.eigh((omega.T @ known + known.T @ omega) / 2)
    kept = values > FLOOR * values[-1].clamp(min=0)
    half = known @ vectors[:, kept] / values[kept].sqrt()
    found = half @ half.T
    found.diagonal().clamp_(min=1)
    root = root / found.diagonal().sqrt()
    found *= root[:, None] * root
    return Moments.of(found.float(), tokens)


def _directions(features: int, columns: int, seed: int) -> Tensor:
    """Ω: orthonormal columns, float64. Both ends make it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(features, columns, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis
