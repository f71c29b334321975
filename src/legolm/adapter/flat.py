"""Factors as one flat tensor, and where each of them is in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from legolm.adapter.keys import adapter_keys, factor_shape, is_whitened, parse_key
from legolm.block import Coverage
from legolm.errors import LegolmError


class Layout:
    """Where each factor is in a flat tensor: keys in order, shapes, and the number of entries."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.shapes = {key: (shapes[key][0], shapes[key][1]) for key in sorted(shapes)}
        self.spans: dict[str, slice] = {}
        self.total = 0
        for key, shape in self.shapes.items():
            self.spans[key] = slice(self.total, self.total + math.prod(shape))
            self.total += math.prod(shape)

    @staticmethod
    def of(factors: Mapping[str, Tensor]) -> Layout:
        """The layout of these factors."""
        return Layout({key: (tensor.shape[0], tensor.shape[1]) for key, tensor in factors.items()})


class Flat(Mapping[str, Tensor]):
    """Factors by key as views of one flat float32 tensor, made when they are asked for. Not to be written to."""

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        self.flat, self.layout = flat, layout

    def __getitem__(self, key: str) -> Tensor:
        return self.flat[self.layout.spans[key]].view(self.layout.shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.shapes)

    def __len__(self) -> int:
        return len(self.layout.shapes)


def adapter_layout(
    coverage: Coverage, keys: Iterable[str], rank: int, ranks: Mapping[str, int] | None = None
) -> Layout:
    """Where a block's factors of this rank are in a message; `ranks` are those of single modules, if lower."""
    own = ranks or {}
    found = {}
    for key in keys:
        module = parse_key(key)[1].rpartition(".")[2]
        found[key] = factor_shape(coverage, key, min(rank, own.get(module, rank)))
    return Layout(found)


def whitened_layout(
    coverage: Coverage, targets: Iterable[str] | None, rank: int, ranks: Mapping[str, int] | None = None
) -> Layout:
    """The same of those factors alone that come with the block (`is_whitened`)."""
    keys = [key for key in adapter_keys(coverage, targets) if is_whitened(key, coverage.shape)]
    return adapter_layout(coverage, keys, rank, ranks)


def check_finite(factors: Flat) -> None:
    """Raise `LegolmError` naming the first factor with NaN or infinity."""
    # A sum is not finite if an entry is not, and costs a tenth of looking at each; it may overflow, so look then.
    if not math.isfinite(float(factors.flat.sum())):
        for key, tensor in factors.items():
            if not bool(tensor.isfinite().all()):
                raise LegolmError(f"{key} is not finite")
