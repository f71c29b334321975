"""Adapters between the LLM's coordinates and a block's slice.

Factor A of a module is (rank, in) and B is (out, rank). A block holds some columns of A, some rows of B and the first
`rank` of the LLM's rank rows. `slice_factors` reads a block's slice out of a global adapter;
`add_slice` adds one into it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from legolm.coverage.maps import Coverage
from legolm.models.family import Shape
from legolm.types import LegolmError, Tensors


def factor_key(layer: int, module: str, side: str) -> str:
    """`layers.{LLM layer}.{module}.{A|B}`."""
    return f"layers.{layer}.{module}.{side}"


def parse_key(key: str) -> tuple[int, str, str]:
    """(LLM layer, module, side) of a factor key. Raises `LegolmError` when it is not one."""
    head, _, rest = key.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, side = rest.rpartition(".")
    if head != "layers" or not layer.isdecimal() or not module or side not in ("A", "B"):
        raise LegolmError(f"adapter: {key!r} is not a key of the form layers.N.module.A or .B")
    return int(layer), module, side


def modules_of(shape: Shape, targets: Iterable[str] | None, field: str = "lora.targets") -> list[str]:
    """Modules named by their last part (None: all), in the family's order. Raises `LegolmError` for others."""
    known = {module.rpartition(".")[2]: module for module in shape.modules}
    wanted = list(known if targets is None else targets)
    for name in wanted:
        if name not in known:
            raise LegolmError(
                f"{field}: {name!r} is not a linear layer of family {shape.family!r}; known: {', '.join(known)}"
            )
    return [module for name, module in known.items() if name in wanted]


def factor_shape(coverage: Coverage, key: str, rank: int) -> tuple[int, int]:
    """Shape of a factor in the block's slice."""
    layer, module, side = parse_key(key)
    rows, cols = coverage.matrix(layer, module)
    return (rank, cols) if side == "A" else (rows, rank)


def init_factors(
    shape: Shape, targets: Iterable[str] | None, rank: int, seed: int, ranks: Mapping[str, int] | None = None
) -> Tensors:
    """The server's start, shared by all clients: A uniform in ±1/sqrt(in) (as PEFT's LoRA), B zero; float32.

    `ranks` are those of single modules, named by their last part.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    modules = modules_of(shape, targets)
    modules_of(shape, ranks or {}, "lora.ranks")
    for layer in range(shape.layers):
        for module in modules:
            rows, cols = shape.matrix(module)
            own = (ranks or {}).get(module.rpartition(".")[2], rank)
            uniform = torch.rand(own, cols, generator=generator)
            factors[factor_key(layer, module, "A")] = (2 * uniform - 1) / math.sqrt(cols)
            factors[factor_key(layer, module, "B")] = torch.zeros(rows, own)
    return factors


def _cut(coverage: Coverage, key: str, tensor: Tensor, rank: int) -> Tensor:
    """The block's slice of one global factor, a copy."""
    layer, module, side = parse_key(key)
    if side == "A":
        cols = coverage.cols(layer, module)
        return (tensor[:rank] if cols is None else tensor[:rank, cols]).clone()
    rows = coverage.rows(layer, module)
    return (tensor[:, :rank] if rows is None else tensor[rows, :rank]).clone()


def add_slice(coverage: Coverage, key: str, into: Tensor, rank: int, value: Tensor | float) -> None:
    """Add a block's slice of rank `rank`, or one number on all of it, into a global factor in place."""
    layer, module, side = parse_key(key)
    if side == "A":
        cols = coverage.cols(layer, module)
        into[:rank, slice(None) if cols is None else cols] += value
    else:
        rows = coverage.rows(layer, module)
        into[slice(None) if rows is None else rows, :rank] += value


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


def slice_factors(coverage: Coverage, factors: Tensors, rank: int) -> Tensors:
    """The block's slice of a global adapter: the layers, rows, columns and first `rank` rank rows that it holds."""
    held = set(coverage.layers)
    return {key: _cut(coverage, key, tensor, rank) for key, tensor in factors.items() if parse_key(key)[0] in held}


def tensors_hash(tensors: Tensors) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
