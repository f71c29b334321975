"""What the composed model holds: the LLM, another block, the sources' union, or a shape that has room for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from legolm.adapter import FACTORS
from legolm.block import Base, Block, Coverage, add_matrix, read_block, slice_matrix
from legolm.errors import LegolmError, brief, nearest
from legolm.models import Shape, config_changes
from legolm.runs import HASHES, check_sealed

SIZES = ("layers", "kv_groups", "neurons")


def checked_block(path: Path) -> Block:
    """The block in a folder. Raises `LegolmError` as `read_block`, and where a run wrote it, for any other content."""
    if (path / HASHES).is_file():
        check_sealed(path)
    return read_block(path)


def target_block(path: Path) -> Block:
    """A block to compose into. Raises `LegolmError` when it has learned something already, which would count twice."""
    block = checked_block(path)
    if (path / FACTORS).is_file() or block.method == "composed":
        raise LegolmError(f"--into {path}: has learned something already; give the block as it was cut")
    return block


def parse_sizes(text: str) -> dict[str, int]:
    """`layers=30,kv_groups=3,neurons=1536`, or some of them. Raises `LegolmError`."""
    sizes = {}
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if name not in SIZES:
            raise LegolmError(f"--into {text}: unknown size {name!r};{nearest(name, SIZES)}")
        if name in sizes:
            raise LegolmError(f"--into {brief(text)}: {name} is given twice; give it once")
        if not count.isdecimal() or len(count) > 9 or int(count) < 1:
            raise LegolmError(f"--into {brief(text)}: {name} must be a number from 1, not {brief(count)!r}")
        sizes[name] = int(count)
    return sizes


def shaped(coverages: Sequence[Coverage], base: Base, sizes: dict[str, int] | None) -> Coverage:
    """The union's layers, KV groups and neurons, and then the LLM's others in order, up to `sizes`.

    What `sizes` leaves out, or all of it if None, is the smallest that holds the union: every layer has as many KV
    groups and neurons as the one with most. Raises `LegolmError` when the shape is too small, naming the nearest that
    holds the blocks.
    """
    shape = base.shape
    layers = sorted({layer for coverage in coverages for layer in coverage.layers})
    groups = {layer: _union(coverages, layer, "groups") for layer in layers}
    neurons = {layer: _union(coverages, layer, "neurons") for layer in layers}
    least = {"layers": len(layers), "kv_groups": _most(groups.values()), "neurons": _most(neurons.values())}
    least["kv_groups"] = _taken(least["kv_groups"], base)
    asked = least | (sizes or {})
    held = {size: min(max(asked[size], least[size]), getattr(shape, size)) for size in SIZES}
    held["kv_groups"] = _taken(held["kv_groups"], base)
    if asked != held:
        wanted, can = (",".join(f"{size}={found[size]}" for size in SIZES) for found in (asked, held))
        raise LegolmError(f"--into {wanted}: cannot hold the blocks in this LLM; the nearest shape that can is {can}")
    layers = _filled(layers, held["layers"], shape.layers)
    return Coverage(
        shape,
        tuple(layers),
        tuple(tuple(_filled(groups.get(layer, ()), held["kv_groups"], shape.kv_groups)) for layer in layers),
        tuple(tuple(_filled(neurons.get(layer, ()), held["neurons"], shape.neurons)) for layer in layers),
    )


def masked_like(target: Coverage, coverages: Sequence[Coverage]) -> Coverage:
    """The target without the weights that every source with their row and column had dropped."""
    if not any(coverage.masks for coverage in coverages):
        return target
    masks = {}
    for layer, module in matrices(target):
        structural = [replace(coverage, masks={}) for coverage in coverages]
        dropped = held(structural, layer, module) & ~held(coverages, layer, module)
        mask = ~slice_matrix(target, layer, module, dropped)
        if not bool(mask.all()):
            masks[f"layers.{layer}.{module}"] = mask.clone()
    return replace(target, masks=masks)


def held(coverages: Sequence[Coverage], layer: int, module: str) -> Tensor:
    """Bool, the LLM's matrix: entries that some block holds."""
    count = torch.zeros(coverages[0].shape.matrix(module), dtype=torch.int32)
    for coverage in coverages:
        if layer in coverage.layers:
            mask = coverage.mask(layer, module)
            one = torch.ones(coverage.matrix(layer, module), dtype=torch.int32) if mask is None else mask.int()
            add_matrix(coverage, layer, module, count, one)
    return count > 0


def covered_weights(target: Coverage, coverages: Sequence[Coverage]) -> int:
    """How many of the target's weights some block holds."""
    total = 0
    for layer, module in matrices(target):
        found, mask = slice_matrix(target, layer, module, held(coverages, layer, module)), target.mask(layer, module)
        total += int((found if mask is None else found & mask).sum())
    return total


def matrices(coverage: Coverage) -> Iterator[tuple[int, str]]:
    """(LLM layer, module) of all linear layers."""
    return ((layer, module) for layer in coverage.layers for module in coverage.shape.modules)


def _union(coverages: Sequence[Coverage], layer: int, units: str) -> set[int]:
    return {
        one
        for coverage in coverages
        if layer in coverage.layers
        for one in getattr(coverage, units)[coverage.layers.index(layer)]
    }


def _most(sets: Collection[Collection[int]]) -> int:
    return max(map(len, sets))


def _filled(kept: Collection[int], count: int, size: int) -> list[int]:
    """`kept` and the lowest other indices, `count` in all, ascending."""
    others = [index for index in range(size) if index not in kept]
    return sorted([*kept, *others[: count - len(kept)]])


def _taken(count: int, base: Base) -> int:
    """The smallest number of KV groups from `count` that the family's config takes."""
    for groups in range(count, base.shape.kv_groups):
        small: Shape = replace(base.shape, kv_groups=groups)
        try:
            config_changes(base.config, small, tuple(range(small.layers)))
        except LegolmError:
            continue
        return groups
    return base.shape.kv_groups
