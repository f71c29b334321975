"""Factors on the wire: one flat tensor, with fewer bits an entry or fewer entries if wanted.

`factors` holds all factors one after the other in the order of their keys; both sides know keys and shapes from the
block's coverage, so that no names travel and a server checks and adds an update as one tensor. `bf16` rounds each
entry. `int8` rounds it to 255 steps between ± the largest of its rank row (of A) or column (of B), whose float32 step
is in `scales`. With `keep` < 1 only the largest entries of each factor travel, and `kept` has a bit for each entry.
What a codec loses, a client adds to its next update (error feedback: Karimireddy et al., arXiv 1901.09847).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from legolm.adapter import Flat, Layout, Tensors
from legolm.config import Codec
from legolm.errors import PublicError

FACTORS, SCALES, KEPT = "factors", "scales", "kept"
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
STEPS = 127


def encode(factors: Mapping[str, Tensor], codec: Codec, keep: float = 1.0) -> Tensors:
    """Float32 factors by key as tensors to send; `keep` is the share of each factor's entries, the largest, that go."""
    if not factors:
        return {}
    parts, scales, masks = [], [], []
    for key in sorted(factors):
        tensor = factors[key]
        if codec == "int8":
            step = tensor.abs().amax(_across(key), keepdim=True) / STEPS
            scales.append(step.flatten())
            tensor = (tensor / torch.where(step > 0, step, 1.0)).round()
        if keep < 1:
            masks.append(most_salient(factors[key], keep).flatten())
            tensor = tensor.flatten()[masks[-1]]
        parts.append(tensor.flatten().to(DTYPES[codec]))
    content = {FACTORS: torch.cat(parts)}
    if scales:
        content[SCALES] = torch.cat(scales)
    if masks:
        content[KEPT] = torch.from_numpy(np.packbits(torch.cat(masks).numpy()))
    return content


def decode(content: Tensors, codec: Codec, layout: Layout, keep: float = 1.0) -> Flat:
    """Factors of this layout, float32. Raises `LegolmError` when `content` is not what `encode` makes of them."""
    wanted = {FACTORS} | ({SCALES} if codec == "int8" else set()) | ({KEPT} if keep < 1 else set())
    wanted = wanted if layout.shapes else set()
    missing, foreign = sorted(wanted - set(content)), sorted(set(content) - wanted)
    if missing or foreign:
        raise PublicError(f"{missing[0]} is missing" if missing else f"{foreign[0]} was not asked for")
    if not wanted:
        return Flat(torch.zeros(0), layout)
    mask = _mask(content[KEPT], layout) if keep < 1 else None
    flat = content[FACTORS]
    _check(FACTORS, flat, DTYPES[codec], layout.total if mask is None else int(mask.sum()))
    if mask is not None:
        flat = torch.zeros(layout.total, dtype=flat.dtype).masked_scatter_(mask, flat)
    if codec != "int8":
        return Flat(flat.float(), layout)
    ranks = [shape[1 - _across(key)] for key, shape in layout.shapes.items()]
    _check(SCALES, content[SCALES], torch.float32, sum(ranks))
    factors = Flat(flat.float(), layout)
    for (key, factor), step in zip(factors.items(), torch.split(content[SCALES], ranks), strict=True):
        factor.mul_(step.unsqueeze(_across(key)))
    return factors


def most_salient(tensor: Tensor, keep: float) -> Tensor:
    """Bool mask of the `keep` share with the largest size; ties go to the earlier entry."""
    count = round(keep * tensor.numel())
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[tensor.abs().flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(tensor)


def encoded_bytes(layout: Layout, codec: Codec, keep: float = 1.0) -> int:
    """Bytes of the tensors that `encode` makes, without the message's header."""
    total = sum(round(keep * math.prod(shape)) for shape in layout.shapes.values()) * DTYPES[codec].itemsize
    if codec == "int8":
        total += 4 * sum(shape[1 - _across(key)] for key, shape in layout.shapes.items())
    return total + ((layout.total + 7) // 8 if keep < 1 else 0)


def _across(key: str) -> int:
    """The dimension that a rank row (of A) or column (of B) runs along."""
    return 1 if key.endswith(".A") else 0


def _mask(packed: Tensor, layout: Layout) -> Tensor:
    _check(KEPT, packed, torch.uint8, (layout.total + 7) // 8)
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=layout.total).astype(bool))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype:
        raise PublicError(f"{name} is {tensor.dtype}; must be {str(dtype).removeprefix('torch.')}")
    if tuple(tensor.shape) != (count,):
        raise PublicError(f"{name} has shape {tuple(tensor.shape)}; the block's is ({count},)")
