"""Adapters between the LLM's coordinates and a block's slice.

Factor A of a module is (rank, in) and B is (out, rank). A block holds some columns of A, some rows of B and the first
`rank` of the LLM's rank rows. `slice_factors` reads a block's slice out of a global adapter;
`add_slice` adds one into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from legolm.adapter.keys import Tensors, parse_key
from legolm.block import Coverage


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


def slice_factors(coverage: Coverage, factors: Tensors, rank: int) -> Tensors:
    """The block's slice of a global adapter: the layers, rows, columns and first `rank` rank rows that it holds."""
    held = set(coverage.layers)
    return {key: _cut(coverage, key, tensor, rank) for key, tensor in factors.items() if parse_key(key)[0] in held}


def tensors_hash(tensors: Tensors) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()


def mixed(parts: Sequence[tuple[float, Tensors]]) -> Tensors:
    """One adapter, float32, whose product is the weighted sum of these adapters' products.

    Where of every module one factor is the same in all of them (the frozen-side form), the sum of the other one is the
    sum of the products, and the rank stays; else the rank rows stand one after the other.
    """
    (weight, first), *rest = parts
    same = {key for key, tensor in first.items() if all(torch.equal(tensor, other[key]) for _, other in rest)}
    scaled = {f"{key[:-1]}{'B' if f'{key[:-1]}A' in same else 'A'}" for key in same}
    if len(same | scaled) < len(first):
        weighted = [{key: t * w if key.endswith(".B") else t for key, t in one.items()} for w, one in parts]
        return reduce(concatenated, weighted)
    return {
        key: sum((w * one[key] for w, one in rest), weight * tensor) if key in scaled else tensor
        for key, tensor in first.items()
    }


def concatenated(one: Tensors, two: Tensors) -> Tensors:
    """One adapter whose product is the sum of both: their rank rows one after the other."""
    if not one or not two:
        return one or two
    return {key: torch.cat([tensor, two[key]], 0 if key.endswith(".A") else 1) for key, tensor in one.items()}
