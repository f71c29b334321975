"""One figure of a model with its standard error, and what each question gave to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A value and its standard error over `count` questions; None where one question says nothing of the spread."""

    value: float
    stderr: float | None
    count: int

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`; null for an undefined figure of the harness, which JSON has no number for."""
        value = self.value if math.isfinite(self.value) else None
        return {"value": value, "stderr": self.stderr, "count": self.count}


@dataclass(frozen=True)
class RatioFigure(Figure):
    """Σ `sums` / Σ `weights` over the questions (each (count,) float64), or its exponential.

    `influence` (count,) is how far each question pulls the value from what it would be on average, so that
    √(count / (count − 1) · Σ influence²) is the standard error. `questions` is a digest of what was asked, in order.
    """

    questions: str
    sums: Array
    weights: Array
    influence: Array

    def as_json(self) -> dict[str, Any]:
        """With the questions' own sums and, where they are not all one, their weights."""
        weights = {} if (self.weights == 1).all() else {"weights": self.weights.tolist()}
        return super().as_json() | {"sums": self.sums.tolist()} | weights


def whole_json(figure: Figure) -> dict[str, Any]:
    """All of a figure, for `figure_of`."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(figure).items()}


def figure_of(found: dict[str, Any]) -> Figure:
    """The figure that `whole_json` wrote."""
    if "sums" not in found:
        return Figure(**found)
    arrays = {name: np.asarray(found[name], dtype=np.float64) for name in ("sums", "weights", "influence")}
    return RatioFigure(**found | arrays)


def ratio_figure(
    sums: Sequence[float] | Array,
    weights: Sequence[float] | Array | None,
    questions: str,
    exponential: bool = False,
) -> RatioFigure:
    """A figure that is a mean over questions (`weights` None: all 1), a ratio of two sums, or its exponential.

    The standard error is that of the ratio estimator (Cochran, "Sampling Techniques", 1977, section 6.4): a question is
    drawn with all its tokens, so tokens of one answer are not taken for independent. Of the exponential: delta method.
    """
    over = np.asarray(sums, dtype=np.float64)
    under = np.ones_like(over) if weights is None else np.asarray(weights, dtype=np.float64)
    ratio = over.sum() / under.sum()
    value = np.exp(ratio) if exponential else ratio
    influence = (over - ratio * under) / under.sum() * (value if exponential else 1.0)
    return RatioFigure(float(value), spread(influence), len(over), questions, over, under, influence)


def spread(influence: Array) -> float | None:
    """The standard error that the influences (count,) of independent questions add up to."""
    count = len(influence)
    return float(np.sqrt(count / (count - 1) * np.square(influence).sum())) if count > 1 else None


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of what was asked, so that only answers to the same questions are compared."""
    found = hashlib.sha256()
    for part in parts:
        found.update(repr(part).encode())
        found.update(b"\n")
    return found.hexdigest()
