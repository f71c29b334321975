"""Coverage: kept layers, KV groups, neurons and weights, recorded when the block is cut.

The hidden size is never cut, so each module keeps one side whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from legolm.errors import LegolmError
from legolm.models import Shape, Unit
from legolm.system import open_tensors, strict_json


@dataclass(frozen=True)
class Coverage:
    """What a block holds of an LLM of shape `shape`.

    `layers[j]` is the LLM layer that is the block's layer j; `groups[j]` and `neurons[j]` are the KV groups and MLP
    neurons it keeps, ascending. `masks["layers.{LLM layer}.{module}"]` is a bool tensor in the block's slice, True
    where an unstructured or N:M block keeps a weight; modules without one keep all of their slice.
    """

    shape: Shape
    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.groups) == len(self.neurons):
            raise LegolmError("coverage: layers, groups and neurons must have one entry a layer")
        _check_index("layers", self.layers, self.shape.layers)
        for layer, groups, neurons in zip(self.layers, self.groups, self.neurons, strict=True):
            _check_index(f"layers.{layer}.kv_groups", groups, self.shape.kv_groups)
            _check_index(f"layers.{layer}.neurons", neurons, self.shape.neurons)
        for key, mask in self.masks.items():
            _, layer_text, module = key.split(".", 2)
            if int(layer_text) not in self.layers or tuple(mask.shape) != self.matrix(int(layer_text), module):
                raise LegolmError(f"coverage: mask {key} of shape {tuple(mask.shape)} does not fit its module")

    @staticmethod
    def full(shape: Shape) -> Coverage:
        """The whole LLM."""
        count = shape.layers
        groups, neurons = tuple(range(shape.kv_groups)), tuple(range(shape.neurons))
        return Coverage(shape, tuple(range(count)), (groups,) * count, (neurons,) * count)

    def within(self, layers: Collection[int]) -> Coverage:
        """The same of these LLM layers only. Raises `LegolmError` where the block lacks one of them."""
        lacking = sorted(set(layers) - set(self.layers))
        if lacking:
            raise LegolmError(f"layer {lacking[0]} is not in the block, which has {', '.join(map(str, self.layers))}")
        places = [j for j, layer in enumerate(self.layers) if layer in layers]
        return Coverage(
            self.shape,
            tuple(self.layers[j] for j in places),
            tuple(self.groups[j] for j in places),
            tuple(self.neurons[j] for j in places),
            {key: mask for key, mask in self.masks.items() if int(key.split(".", 2)[1]) in layers},
        )

    def unmasked(self) -> Coverage:
        """The same without bit masks: what an adapter covers that stands beside the zeros."""
        return replace(self, masks={})

    @property
    def block_shape(self) -> Shape:
        """The block's own shape: one number of KV groups and neurons serves all its layers."""
        groups, neurons = len(self.groups[0]), len(self.neurons[0])
        return replace(self.shape, layers=len(self.layers), kv_groups=groups, neurons=neurons)

    @property
    def width(self) -> float:
        """Neurons of a layer of the LLM for one of the block's, at least 1."""
        return self.shape.neurons / self.block_shape.neurons

    def rows(self, layer: int, module: str) -> Tensor | None:
        """Kept output rows (int64, ascending) of a module of an LLM layer; None when all are kept."""
        units = self.shape.module(module).rows
        kept = [self._index(layer, unit) for unit in units]
        if all(index is None for index in kept):
            return None
        parts, start = [], 0
        for unit, index in zip(units, kept, strict=True):
            size = self.shape.size(unit)
            parts.append(start + (torch.arange(size) if index is None else index))
            start += size
        return torch.cat(parts)

    def cols(self, layer: int, module: str) -> Tensor | None:
        """Kept input columns, like `rows`."""
        return self._index(layer, self.shape.module(module).cols)

    def matrix(self, layer: int, module: str) -> tuple[int, int]:
        """(rows, columns) of a module in the block's slice."""
        if (layer, module) not in self._matrices:
            spec = self.shape.module(module)
            rows = sum(self._size(layer, unit) for unit in spec.rows)
            self._matrices[layer, module] = rows, self._size(layer, spec.cols)
        return self._matrices[layer, module]

    def mask(self, layer: int, module: str) -> Tensor | None:
        """Bool mask of kept weights in the block's slice; None when all are kept."""
        return self.masks.get(f"layers.{layer}.{module}")

    @cached_property
    def kept_weights(self) -> int:
        """Linear decoder weights that the block keeps."""
        return sum(map(self.kept_in, self.layers))

    def kept_in(self, layer: int) -> int:
        """Linear weights that the block keeps of an LLM layer."""
        masks = {module: self.mask(layer, module) for module in self.shape.modules}
        return sum(math.prod(self.matrix(layer, m)) if mask is None else int(mask.sum()) for m, mask in masks.items())

    @property
    def sparsity(self) -> float:
        """Removed share of the decoder's linear weights, structured or not."""
        return 1 - self.kept_weights / (self.shape.layers * self.shape.layer_weights)

    @cached_property
    def mask_sparsity(self) -> float:
        """Share that bit masks remove of the weights that the structure keeps; 0 without masks."""
        held = sum(math.prod(self.matrix(layer, module)) for layer in self.layers for module in self.shape.modules)
        return 1 - self.kept_weights / held

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything above: equal coverage, equal hash."""
        digest = hashlib.sha256(json.dumps(asdict(self.shape), sort_keys=True).encode())
        for name, tensor in sorted(_to_tensors(self).items()):
            digest.update(f"{name}|{tuple(tensor.shape)}|".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _matrices(self) -> dict[tuple[int, str], tuple[int, int]]:
        return {}  # asked for with every factor

    @cached_property
    def _position(self) -> dict[int, int]:
        return {layer: j for j, layer in enumerate(self.layers)}

    def _size(self, layer: int, unit: Unit) -> int:
        """Rows (or columns) that the block keeps."""
        if unit == "hidden":
            return self.shape.hidden
        j = self._position[layer]
        return len(self.neurons[j] if unit == "neuron" else self.groups[j]) * self.shape.per_group(unit)

    def _index(self, layer: int, unit: Unit) -> Tensor | None:
        if unit == "hidden":
            return None
        j = self._position[layer]
        kept = self.neurons[j] if unit == "neuron" else self.groups[j]
        if len(kept) == (self.shape.neurons if unit == "neuron" else self.shape.kv_groups):
            return None
        index = torch.tensor(kept, dtype=torch.int64)
        if unit == "neuron":
            return index
        width = self.shape.per_group(unit)
        return (index[:, None] * width + torch.arange(width)).flatten()


def save_coverage(coverage: Coverage, path: Path) -> None:
    """Write one safetensors file: indices as int32, masks as packed bits, the LLM's shape in the header."""
    save_file(_to_tensors(coverage), path, metadata={"shape": json.dumps(asdict(coverage.shape))})


def load_coverage(path: Path) -> Coverage:
    """Read what `save_coverage` wrote. Raises `LegolmError` when the file is broken or its indices do not fit."""
    with open_tensors(path, "coverage ", "cut the block again") as handle:
        sizes = strict_json((handle.metadata() or {})["shape"])
        if any(type(size) is not int or size < 1 for name, size in sizes.items() if name != "family"):
            raise ValueError("a size of the LLM is no number from 1")
        shape = Shape(**sizes)
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        if any(t.dtype != (torch.uint8 if key.endswith(".mask") else torch.int32) for key, t in tensors.items()):
            raise ValueError("indices must be I32 and masks U8")
        layers = tuple(tensors["layers"].tolist())
        structure = Coverage(
            shape,
            layers,
            tuple(tuple(tensors[f"layers.{i}.kv_groups"].tolist()) for i in layers),
            tuple(tuple(tensors[f"layers.{i}.neurons"].tolist()) for i in layers),
        )
        masks = {
            key.removesuffix(".mask"): unpack_mask(
                bits, structure.matrix(int(key.split(".")[1]), key.split(".", 2)[2][:-5])
            )
            for key, bits in tensors.items()
            if key.endswith(".mask")
        }
        return Coverage(shape, layers, structure.groups, structure.neurons, masks) if masks else structure


def _to_tensors(coverage: Coverage) -> dict[str, Tensor]:
    tensors = {"layers": torch.tensor(coverage.layers, dtype=torch.int32)}
    for layer, groups, neurons in zip(coverage.layers, coverage.groups, coverage.neurons, strict=True):
        tensors[f"layers.{layer}.kv_groups"] = torch.tensor(groups, dtype=torch.int32)
        tensors[f"layers.{layer}.neurons"] = torch.tensor(neurons, dtype=torch.int32)
    return tensors | {f"{key}.mask": pack_mask(mask) for key, mask in coverage.masks.items()}


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask as bits, uint8: an eighth of its bytes."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """What `pack_mask` packed. Raises `ValueError` when it is not of this shape."""
    count = shape[0] * shape[1]
    if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
        raise ValueError(f"a mask of {bits.numel()} bytes for {count} weights")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool).reshape(shape))


def _check_index(name: str, kept: tuple[int, ...], size: int) -> None:
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise LegolmError(f"coverage: {name} must be ascending indices from 0 to {size - 1}, at least one")


def add_matrix(coverage: Coverage, layer: int, module: str, into: Tensor, value: Tensor) -> None:
    """Add a block's matrix of a module into the LLM's in place; dtypes are equal."""
    rows, cols = coverage.rows(layer, module), coverage.cols(layer, module)
    if rows is not None:
        into.index_add_(0, rows, value)
    elif cols is not None:
        into.index_add_(1, cols, value)
    else:
        into += value


def slice_matrix(coverage: Coverage, layer: int, module: str, matrix: Tensor) -> Tensor:
    """The block's part of the LLM's matrix of a module."""
    rows, cols = coverage.rows(layer, module), coverage.cols(layer, module)
    matrix = matrix if rows is None else matrix[rows]
    return matrix if cols is None else matrix[:, cols]
