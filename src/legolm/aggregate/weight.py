"""The weight behind each entry of a global adapter, and where a block's entries are.

Structural coverage is separable: within a layer an entry's weight depends on its KV group or neuron (or on neither, on
the side that is never cut) and on its rank row. So a layer needs one number for each neuron and rank, not one for each
entry of fourteen factors.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from legolm.adapter import Tensors, factor_shape, parse_key
from legolm.block import Coverage
from legolm.models import Shape, Unit

PLACEMENTS = 16
"""Coverages whose indices are kept: blocks are few, and memory must not grow with clients."""


class Placement:
    """Where a block's slice is in the LLM's factors; indices are made once."""

    _known: ClassVar[OrderedDict[str, Placement]] = OrderedDict()

    def __init__(self, coverage: Coverage) -> None:
        self._coverage = coverage
        self._index: dict[str, Tensor | None] = {}
        self._neurons: dict[int, Tensor | slice] = {}

    @classmethod
    def of(cls, coverage: Coverage) -> Placement:
        """The placement of a coverage, from the last few used."""
        known = cls._known
        if coverage.hash not in known:
            known[coverage.hash] = Placement(coverage)
            if len(known) > PLACEMENTS:
                known.popitem(last=False)
        known.move_to_end(coverage.hash)
        return known[coverage.hash]

    @property
    def whole(self) -> bool:
        """Every layer, KV group and neuron of the LLM."""
        shape = self._coverage.shape
        return (
            len(self._coverage.layers) == shape.layers
            and all(len(groups) == shape.kv_groups for groups in self._coverage.groups)
            and all(len(neurons) == shape.neurons for neurons in self._coverage.neurons)
        )

    def index(self, key: str) -> Tensor | None:
        """Columns of an A or rows of a B that the block holds; None: all."""
        if key not in self._index:
            layer, module, side = parse_key(key)
            self._index[key] = (self._coverage.cols if side == "A" else self._coverage.rows)(layer, module)
        return self._index[key]

    def neurons(self, j: int) -> Tensor | slice:
        """MLP neurons of the block's layer j."""
        if j not in self._neurons:
            kept = self._coverage.neurons[j]
            whole = len(kept) == self._coverage.shape.neurons
            self._neurons[j] = slice(None) if whole else torch.tensor(kept)
        return self._neurons[j]

    def add(self, key: str, into: Tensor, value: Tensor, weight: float) -> None:
        """into += weight · value at the block's entries; `into` is float64, `value` float32 of the block's shape."""
        index, side = self.index(key), key[-1]
        rank = value.shape[0] if side == "A" else value.shape[1]
        if rank < (into.shape[0] if side == "A" else into.shape[1]):
            into = into[:rank] if side == "A" else into[:, :rank]
        if index is None:
            into.add_(value, alpha=weight)
        else:
            into.index_add_(1 if side == "A" else 0, index, value.double(), alpha=weight)


def holders(keys: Iterable[str], members: Sequence[tuple[Coverage, int]]) -> dict[int, int]:
    """Entries of these factors by the number of members (coverage, rank) that hold them, those that somebody does."""
    shape, rank = members[0][0].shape, max(rank for _, rank in members)
    weight, found = EntryWeight(shape, rank), Counter[int]()
    for coverage, own in members:
        weight.add(coverage, own, 1.0)
    for key in keys:
        full = factor_shape(Coverage.full(shape), key, rank)
        counts = Counter(weight.of(key, torch.empty(full, device="meta")).flatten().int().tolist())
        each = math.prod(full) // counts.total()  # of the side that is never cut, all entries alike
        found.update({count: each * number for count, number in counts.items()})
    return {count: entries for count, entries in sorted(found.items()) if count}


def held_by(shapes: Mapping[str, tuple[int, int]], members: Iterable[tuple[Coverage, int]]) -> Tensors:
    """How many members (coverage, rank) hold each entry of the LLM's factors of these shapes, by key, float64."""
    known = list(members)
    weight = EntryWeight(known[0][0].shape, max(rank for _, rank in known))
    for coverage, rank in known:
        weight.add(coverage, rank, 1.0)
    return {key: weight.of(key, torch.empty(shape, device="meta")).expand(shape) for key, shape in shapes.items()}


class EntryWeight:
    """Σ n_k c_k over clients for every entry of the factors, float64, stored by layer, KV group, neuron and rank row.

    A client of rank r adds its n at rank row r − 1 only; the sum from the end gives what stands behind each row.
    """

    def __init__(self, shape: Shape, rank: int) -> None:
        self._shape, self._rank = shape, rank
        self._tensors: Tensors = {}
        self._sums: Tensors = {}
        self._waiting: dict[tuple[str, int], tuple[Coverage, float]] = {}

    def add(self, coverage: Coverage, rank: int, n: float) -> None:
        """One client of weight `n`. Clients with one block and rank are counted together first."""
        key = (coverage.hash, rank)
        self._waiting[key] = (coverage, n + self._waiting.get(key, (coverage, 0.0))[1])
        if len(self._waiting) > PLACEMENTS:
            self._settle()

    def _settle(self) -> None:
        if self._waiting:
            self._sums = {}
        for (_, rank), (coverage, n) in self._waiting.items():
            placement, last = Placement.of(coverage), rank - 1
            for j, layer in enumerate(coverage.layers):
                groups = list(coverage.groups[j])
                self._of(f"layers.{layer}", 1)[0, last] += n
                self._of(f"layers.{layer}.kv_groups", self._shape.kv_groups)[groups, last] += n
                self._of(f"layers.{layer}.neurons", self._shape.neurons)[placement.neurons(j), last] += n
        self._waiting = {}

    def of(self, key: str, factor: Tensor) -> Tensor:
        """The weights of one factor, in a shape that broadcasts to it; its module's rank may be below the run's."""
        layer, module, side = parse_key(key)
        weight = self.units(layer, module, cut=(side == "A") == (self._shape.module(module).cols != "hidden"))
        return weight.T[: factor.shape[0]] if side == "A" else weight[:, : factor.shape[1]]

    def units(self, layer: int, module: str, cut: bool = True) -> Tensor:
        """(units of the module's cut side, or 1 for the other side; rank)."""
        self._settle()
        if not cut:
            return self._behind(f"layers.{layer}", 1)
        spec = self._shape.module(module)
        units: tuple[Unit, ...] = spec.rows if spec.cols == "hidden" else (spec.cols,)
        return torch.cat([self._along(layer, unit) for unit in units])

    def _along(self, layer: int, unit: Unit) -> Tensor:
        if unit == "neuron":
            return self._behind(f"layers.{layer}.neurons", self._shape.neurons)
        groups = self._behind(f"layers.{layer}.kv_groups", self._shape.kv_groups)
        return groups.repeat_interleave(self._shape.per_group(unit), 0)

    def _behind(self, name: str, units: int) -> Tensor:
        """What stands behind each rank row: the sum from the end. Modules share it, so it is made once."""
        if name not in self._sums:
            self._sums[name] = self._of(name, units).flip(1).cumsum(1).flip(1)
        return self._sums[name]

    def _of(self, name: str, units: int) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(units, self._rank, dtype=torch.float64)
        return self._tensors[name]
