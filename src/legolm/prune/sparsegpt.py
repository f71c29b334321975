"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): drop weights and let the rest of the row make up for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from legolm.errors import LegolmError
from legolm.models import autocast
from legolm.prune.moments import Moments
from legolm.prune.registry import Pattern, criterion

BLOCK = 128
DAMP = 0.03
"""Of the mean diagonal of H, added to it. The authors have 0.01; this was better (docs/pruning.md)."""
REFIT = 20
"""Steps of conjugate gradients; ten have most of what there is to win (docs/pruning.md)."""
TINY = 1e-30


@criterion("sparsegpt", needs="full")
def sparsegpt(
    weight: Tensor,
    moments: Moments | None,
    pattern: Pattern,
    *,
    damp: Annotated[float, Field(gt=0)] = DAMP,
    refit: Annotated[int, Field(ge=0)] = REFIT,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: the mask of a block of columns is chosen when it is reached.

    Blocks are of B = Bs = 128 columns, or of the M of an N:M pattern (B about 128, Bs = M).

    `damp` is the share of H's mean diagonal that is added to it. Inputs that were always zero ("dead columns") are
    pruned first and take no part in the update. `refit` is how many steps of conjugate gradients then fit the kept
    weights (`_refit`); 0, as in the paper.
    """
    assert moments is not None
    with autocast("fp32", weight.device.type):  # wherever in a forward pass it is called
        return _sparsegpt(weight, moments, pattern, damp, refit)


def _sparsegpt(weight: Tensor, moments: Moments, pattern: Pattern, damp: float, refit: int) -> tuple[Tensor, Tensor]:
    inverse, dead = _inverse_factor(moments, damp)
    dense, weight = weight, weight.clone()
    weight[:, dead] = 0
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = pattern.group or BLOCK
    span = max(BLOCK // width, 1) * width  # columns of N:M patterns pass their errors on together
    for start in range(0, weight.shape[1], span):
        block, rest = weight[:, start : start + span], weight[:, start + span :]
        rows = inverse[start : start + span]
        factor, errors = rows[:, start : start + span], torch.empty_like(block)
        for at in range(0, block.shape[1], width):
            part, after = slice(at, at + width), slice(at + width, None)
            own = factor[part, part]
            kept = pattern.keep((block[:, part] / own.diagonal()).square(), over="matrix")
            columns, errors[:, part] = _compensate(block[:, part], kept, own)
            block[:, part] = columns * kept
            block[:, after].addmm_(errors[:, part], factor[part, after], alpha=-1)
            mask[:, start : start + span][:, part] = kept
        rest.addmm_(errors, rows[:, start + span :], alpha=-1)
    return (_refit(weight, dense, mask, moments, damp, refit) if refit else weight), mask


def _refit(weight: Tensor, dense: Tensor, mask: Tensor, moments: Moments, damp: float, steps: int) -> Tensor:
    """Of each row the kept weights that minimise (w - dense) H (w - dense)ᵀ, with SparseGPT's as the start.

    SparseGPT fits them column by column, and no column makes up for those after it; this is the least-squares problem
    that it approximates. Conjugate gradients on the inputs' correlations (Jacobi's preconditioner), all rows at once; a
    row that they leave no better stays as it was.
    """
    hessian, size = _correlations(moments, damp)
    wanted, found = dense * size, weight * size
    slope = (wanted - found) @ hessian  # of pruned weights, too: the errors before and after take no more products

    def error() -> Tensor:
        return (slope * (wanted - found)).sum(1, keepdim=True)

    before = error()
    stays = mask.to(weight.dtype)  # one product of two dtypes is a copy more
    direction = slope * stays
    length = direction.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = direction @ hessian
        step = length / (direction * curved).sum(1, keepdim=True).clamp(min=TINY)
        found.addcmul_(step, direction)
        slope.addcmul_(step, curved, value=-1)
        residual, last = torch.mul(slope, stays, out=curved), length
        length = residual.square().sum(1, keepdim=True)
        direction.mul_(length / last.clamp(min=TINY)).add_(residual)
    return torch.where(error() < before, found / size, weight)


def _compensate(block: Tensor, kept: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Go through a block's columns, each one's error passed on; (columns as the ones before left them, errors)."""
    columns = block.T.contiguous()  # transposed: a column is contiguous
    errors = ~kept.T.contiguous() / factor.diagonal()[:, None]
    for i, (column, error, row) in enumerate(zip(columns.unbind(), errors.unbind(), factor.unbind(), strict=True), 1):
        error.mul_(column)
        columns[i:].addr_(row[i:], error, alpha=-1)
    return columns.T, errors.T


@lru_cache(maxsize=1)  # modules that share an input come one after the other
def _correlations(moments: Moments, damp: float) -> tuple[Tensor, Tensor]:
    """The damped H, scaled to a diagonal of ones, and by what (its diagonal's root)."""
    hessian = moments.sum / max(moments.tokens, 1)
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    size = hessian.diagonal().sqrt()
    return hessian / size / size[:, None], size


@lru_cache(maxsize=1)
def _inverse_factor(moments: Moments, damp: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor U of the damped inverse, H⁻¹ = Uᵀ U, solved in float64; and which inputs are dead.

    It is R⁻¹ of H = R Rᵀ with R upper triangular: Cholesky's factor of H in reverse order.
    """
    _correlations.cache_clear()  # of the inputs before
    damped = moments.sum.double() / max(moments.tokens, 1)
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(damp * damped.diagonal().mean())
    damped = damped.flip(0, 1)
    try:
        lower = torch.linalg.cholesky(damped)
    except RuntimeError:  # torch's LinAlgError is one
        raise LegolmError(
            "calibration: the inputs' second moments cannot be inverted; raise calibration.samples"
        ) from None
    del damped
    ones = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, ones, upper=False)
    return inverse.float().flip(0, 1), dead


def forget() -> None:
    """Let go of what the last matrices needed, as large as they are."""
    _correlations.cache_clear()
    _inverse_factor.cache_clear()
