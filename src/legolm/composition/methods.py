"""How changes of one matrix become one: each method is one function over all that hold the matrix.

A method knows one matrix at a time and gives its change in the LLM's coordinates, dense, float64. An entry that a block
does not hold neither votes nor counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from legolm.adapter import Change, factor_key
from legolm.aggregate import ExactForm, FactorSum, Start
from legolm.block import Coverage, add_matrix
from legolm.errors import LegolmError, nearest
from legolm.models import Shape

Form = Literal["exact", "factor"]
METHODS = ("heteagg", "task_arithmetic", "ties")


@dataclass(frozen=True)
class Part:
    """One block's change B·A of one matrix; `coverage` is the block's of this layer, with this matrix's mask alone."""

    coverage: Coverage
    layer: int
    module: str
    a: Tensor
    b: Tensor
    weight: float

    @property
    def shape(self) -> Shape:
        """The LLM's."""
        return self.coverage.shape

    @property
    def mask(self) -> Tensor | None:
        """Of the weights that an unstructured block holds."""
        return self.coverage.mask(self.layer, self.module)

    def change(self) -> Tensor:
        """M ∘ (B·A) in the block's slice, float64."""
        product = self.b.double() @ self.a.double()
        return product if self.mask is None else product * self.mask

    def add(self, into: Tensor, value: Tensor) -> None:
        """Add a matrix of the block's slice into one of the LLM's."""
        add_matrix(self.coverage, self.layer, self.module, into, value.to(into.dtype))

    def zeros(self) -> Tensor:
        """A matrix of the LLM's, float64."""
        return torch.zeros(self.shape.matrix(self.module), dtype=torch.float64)


Combine = Callable[[Sequence[Part]], Tensor]


@dataclass(frozen=True)
class Method:
    """A method with its settings; `settings` are for the record."""

    name: str
    combine: Combine
    settings: dict[str, str | float]

    @property
    def needs_one_start(self) -> bool:
        """Averages factors, which mean something only where all training started from one adapter."""
        return self.settings.get("form") == "factor"


def choose_method(name: str, form: str | None, scaling: float | None, density: float | None) -> Method:
    """The method of this name; None stands for a setting's default. Raises `LegolmError` for what does not fit."""
    given = {"form": form, "scaling": scaling, "density": density}
    own: dict[str, dict[str, str | float]] = {
        "heteagg": {"form": "exact"},
        "task_arithmetic": {"scaling": 1.0},
        "ties": {"scaling": 1.0, "density": 0.2},
    }
    if name not in own:
        raise LegolmError(f"--method {name!r}: is not known;{nearest(name, METHODS)}")
    for setting, value in given.items():
        if value is not None and setting not in own[name]:
            users = " and ".join(method for method, settings in own.items() if setting in settings)
            raise LegolmError(f"--{setting} {value}: is for {users}; --method is {name}")
    settings = own[name] | {setting: value for setting, value in given.items() if value is not None}
    if settings.get("form", "exact") not in ("exact", "factor"):
        raise LegolmError(f"--form {form!r}: must be exact or factor")
    if not math.isfinite(float(settings.get("scaling", 1.0))):
        raise LegolmError(f"--scaling {scaling}: must be a finite number")
    if not 0 < float(settings.get("density", 1.0)) <= 1:
        raise LegolmError(f"--density {density}: must be above 0 and at most 1")
    functions: dict[str, Callable[..., Tensor]] = {"heteagg": heteagg, "task_arithmetic": task_arithmetic, "ties": ties}
    return Method(name, partial(functions[name], **settings), settings)


def heteagg(parts: Sequence[Part], form: Form) -> Tensor:
    """HeteAgg (arXiv 2410.18287) with the coverage mean: of products (`exact`), or of A and B each for itself.

    It is the scheme's own sum, for one round that starts from nothing: what nobody holds has no factor.
    """
    first = parts[0]
    rank = max(len(part.a) for part in parts)
    rows, cols = first.shape.matrix(first.module)
    key_a, key_b = (factor_key(first.layer, first.module, side) for side in "AB")
    zero = {key_a: torch.zeros(rank, cols), key_b: torch.zeros(rows, rank)}
    scheme: ExactForm | FactorSum = ExactForm("coverage_mean") if form == "exact" else FactorSum("coverage_mean")
    scheme.begin(Start(first.shape, lambda: zero, rank))
    for part in parts:
        delta = {key_a: part.a, key_b: part.b}
        received = {key: torch.zeros_like(tensor) for key, tensor in delta.items()}
        scheme.add(Change(delta, received, part.weight, len(part.a)), part.coverage)
    if isinstance(scheme, ExactForm):
        return scheme.change(key_a.rpartition(".")[0])
    scheme.finish()
    factors = scheme.state()
    return factors[key_b].double() @ factors[key_a].double()


def task_arithmetic(parts: Sequence[Part], scaling: float) -> Tensor:
    """λ Σ w_k τ_k (Ilharco et al., arXiv 2212.04089), τ_k what block k learned, zero where it holds nothing.

    Weights have mean 1 over all sources, so that equal ones give the paper's sum.
    """
    total = parts[0].zeros()
    for part in parts:
        part.add(total, scaling * part.weight * part.change())
    return total


def ties(parts: Sequence[Part], density: float, scaling: float) -> Tensor:
    """TIES-merging (Yadav et al., arXiv 2306.01708): trim, elect sign, disjoint mean; λ times the result.

    1. Of each block's change of this matrix the `density` share of the held entries with the largest size stays.
    2. An entry's sign is that of Σ w_k τ_k.
    3. Its change is the mean, weighted by w_k, of the τ_k that have this sign.
    """
    trimmed = [_trim(part, density) for part in parts]
    votes, total, count = (parts[0].zeros() for _ in range(3))
    for part, change in zip(parts, trimmed, strict=True):
        part.add(votes, part.weight * change)
    for part, change in zip(parts, trimmed, strict=True):
        placed = parts[0].zeros()
        part.add(placed, change)
        agrees = placed * votes > 0
        total += torch.where(agrees, part.weight * placed, 0.0)
        count += part.weight * agrees
    return torch.where(count > 0, scaling * total / count, 0.0)


def _trim(part: Part, density: float) -> Tensor:
    """Zeros in all but the largest entries; of equals at the edge all stay."""
    change = part.change()
    held = change.numel() if part.mask is None else int(part.mask.sum())
    keep = max(1, round(density * held))
    size = change.abs()
    edge = size.flatten().kthvalue(change.numel() - keep + 1).values
    return torch.where(size >= edge, change, 0.0)
