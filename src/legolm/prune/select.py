"""Which inputs of a matrix to keep: the structured optimal brain surgeon.

Hassibi and Stork (NeurIPS 1992) for single weights; ZipLM (Kurtic et al., arXiv 2302.04089) for whole structures. With
H = Σ x xᵀ and C = Σ y xᵀ the matrix that answers best is V = C H⁻¹. Dropping a set S of inputs and fitting the rest
anew costs tr(V_S (H⁻¹_SS)⁻¹ V_Sᵀ) in squared error, and both V and H⁻¹ of what is left follow in closed form. So the
cheapest units go first, a few at a time, and each choice knows what the ones before it left to be made up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from legolm.prune.moments import Regression

RIDGE, LEAST_RIDGE = 0.06, 1e-3
"""Of the mean diagonal of H, towards the dense weights, for as many tokens as inputs and, at least, for very many.

Calibration text is short: the fewer tokens an input was seen with, the less the fit may move what reads it. A block
that is fitted to its text alone does worse on other text, and what it learns fits the LLM less (docs/pruning.md).
"""
STEP = 64
COMPACT = 0.75
"""What is gone stays in the matrices, as zeros, until no more than this share of their units is left."""


@dataclass(frozen=True)
class Elimination:
    """Units kept, ascending, and the squared error summed over tokens at each count on the way: (units left, error)."""

    kept: tuple[int, ...]
    errors: tuple[tuple[int, float], ...]


def eliminate(fit: Regression, weight: Tensor, width: int, count: int, step: int = STEP) -> Elimination:
    """Drop units (runs of `width` inputs) of `weight` (out, in) until `count` are left.

    One part in `step` of the units that are left goes at a time.
    """
    normal, wanted = _ridged(fit, weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
    matrix, inverse = (wanted @ inverse).float(), inverse.float()
    kept = torch.arange(weight.shape[1] // width, device=weight.device)
    stays = torch.ones_like(kept, dtype=torch.bool)
    left, error = len(kept), 0.0
    errors = [(left, error)]
    while left > count:
        costs = _costs(matrix, inverse, width).masked_fill(~stays, torch.inf)
        drop = costs.topk(min(max(1, left // step), left - count), largest=False).indices
        gone = (drop[:, None] * width + torch.arange(width, device=drop.device)).flatten()
        rows, columns = inverse[gone], matrix[:, gone]
        # float64 where it is small: the set's own block of H⁻¹, with which it is solved for both.
        solved = torch.linalg.solve(rows[:, gone].double(), torch.cat([rows, columns.T], 1).double())
        share, passed = solved[:, : len(inverse)].float(), solved[:, len(inverse) :].T
        error += float((passed * columns).sum())
        matrix.addmm_(columns, share, alpha=-1)
        inverse.addmm_(rows.T, share, alpha=-1)
        matrix[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
        inverse.diagonal()[gone] = 1  # solvable, for units of several inputs
        stays[drop] = False
        left -= len(drop)
        errors.append((left, error))
        if left < COMPACT * len(kept):  # copying all at each step is most of the time, and more memory
            units = stays.repeat_interleave(width)
            matrix, inverse = matrix[:, units], inverse[units][:, units]
            kept, stays = kept[stays], stays[stays]
    return Elimination(tuple(kept[stays].tolist()), tuple(errors))


def refit(fit: Regression, weight: Tensor, cols: Tensor | None) -> Tensor:
    """argmin over V of Σ‖y − V x[cols]‖² + ridge ‖V − weight[:, cols]‖², solved in float64; the dtype of `weight`."""
    normal, wanted = _ridged(fit, weight)
    if cols is not None:
        normal, wanted = normal[cols][:, cols], wanted[:, cols]
    fitted: Tensor = torch.linalg.solve(normal, wanted, left=False)
    return fitted.to(weight.dtype)


def _costs(matrix: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Error that dropping each unit alone would add."""
    if width == 1:
        return matrix.square().sum(0) / inverse.diagonal()
    units = len(inverse) // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = matrix.view(-1, units, width).permute(1, 2, 0)
    costs: Tensor = (torch.linalg.solve(blocks.double(), columns.double()) * columns).sum((1, 2))
    return costs


def _ridged(fit: Regression, weight: Tensor) -> tuple[Tensor, Tensor]:
    """H and C of the least squares with its ridge, float64."""
    normal = fit.moments.sum.double()
    share = max(LEAST_RIDGE, RIDGE * len(normal) / max(fit.moments.tokens, 1))
    ridge = share * normal.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    normal.diagonal().add_(ridge)
    return normal, fit.cross.double() + ridge * weight.double()
