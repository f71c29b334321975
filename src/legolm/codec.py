"""Factors on the wire: fewer bits an entry, fewer entries.

`bf16` rounds each entry. `int8` rounds it to 255 steps between ± the largest of its rank row (of A) or column (of B),
with that row's float32 step in `scales`. With `keep` < 1 only the largest entries of each tensor travel, in order, and
`kept` has a bit for each entry. What a codec loses, a client adds to its next update (error feedback: Karimireddy et
al., ICML 2019, arXiv 1901.09847).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from legolm.config import Codec
from legolm.types import LegolmError, Tensors

SCALES, KEPT = "scales", "kept"
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
STEPS = 127


def encode(factors: Tensors, codec: Codec, keep: float = 1.0) -> Tensors:
    """Float32 factors by key as tensors to send; `keep` is the share of each tensor's entries, the largest, that go."""
    masks = {key: most_salient(tensor, keep) for key, tensor in factors.items()} if keep < 1 else {}
    content: Tensors = {}
    scales = []
    for key in sorted(factors):
        tensor = factors[key]
        if codec == "int8":
            step = tensor.abs().amax(_across(key), keepdim=True) / STEPS
            scales.append(step.flatten())
            tensor = (tensor / torch.where(step > 0, step, 1.0)).round()
        content[key] = tensor[masks[key]] if masks else tensor
        content[key] = content[key].to(DTYPES[codec]).contiguous()
    if scales:
        content[SCALES] = torch.cat(scales)
    if masks:
        bits = torch.cat([masks[key].flatten() for key in sorted(masks)])
        content[KEPT] = torch.from_numpy(np.packbits(bits.numpy()))
    return content


def decode(content: Tensors, codec: Codec, shapes: Mapping[str, tuple[int, int]], keep: float = 1.0) -> Tensors:
    """Factors of these shapes, float32. Raises `LegolmError` when `content` is not what `encode` makes of them."""
    extra = ({SCALES} if codec == "int8" and shapes else set()) | ({KEPT} if keep < 1 else set())
    missing, foreign = sorted((set(shapes) | extra) - set(content)), sorted(set(content) - set(shapes) - extra)
    if missing or foreign:
        raise LegolmError(f"{missing[0]} is missing" if missing else f"{foreign[0]} was not asked for")
    masks = _masks(content[KEPT], shapes) if keep < 1 else {}
    steps = _steps(content[SCALES], shapes) if SCALES in extra else {}
    factors: Tensors = {}
    for key, shape in shapes.items():
        tensor = content[key]
        wanted = (int(masks[key].sum()),) if masks else shape
        if tensor.dtype != DTYPES[codec]:
            raise LegolmError(f"{key} is {tensor.dtype}; must be {str(DTYPES[codec]).removeprefix('torch.')}")
        if tuple(tensor.shape) != wanted:
            raise LegolmError(f"{key} has shape {tuple(tensor.shape)}; the block's is {wanted}")
        tensor = tensor.float()
        if masks:
            tensor = torch.zeros(shape).masked_scatter_(masks[key], tensor)
        factors[key] = tensor * steps[key] if steps else tensor
    return factors


def most_salient(tensor: Tensor, keep: float) -> Tensor:
    """Bool mask of the `keep` share with the largest size; ties go to the earlier entry."""
    count = round(keep * tensor.numel())
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[tensor.abs().flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(tensor)


def encoded_bytes(shapes: Mapping[str, tuple[int, int]], codec: Codec, keep: float = 1.0) -> int:
    """Bytes of the tensors that `encode` makes, without the message's header."""
    entries = [rows * cols for rows, cols in shapes.values()]
    total = sum(round(keep * count) for count in entries) * DTYPES[codec].itemsize
    if codec == "int8":
        total += 4 * sum(shape[0] if key.endswith(".A") else shape[1] for key, shape in shapes.items())
    return total + ((sum(entries) + 7) // 8 if keep < 1 else 0)


def _across(key: str) -> int:
    return 1 if key.endswith(".A") else 0


def _steps(scales: Tensor, shapes: Mapping[str, tuple[int, int]]) -> Tensors:
    ranks = {key: shapes[key][1 - _across(key)] for key in sorted(shapes)}
    if scales.dtype != torch.float32 or tuple(scales.shape) != (sum(ranks.values()),):
        raise LegolmError(f"{SCALES} is {scales.dtype} of shape {tuple(scales.shape)}; must be float32, one a rank row")
    parts = scales.split(list(ranks.values()))  # type: ignore[no-untyped-call]
    return {key: part.unsqueeze(_across(key)) for key, part in zip(ranks, parts, strict=True)}


def _masks(packed: Tensor, shapes: Mapping[str, tuple[int, int]]) -> Tensors:
    sizes = {key: shapes[key][0] * shapes[key][1] for key in sorted(shapes)}
    total = sum(sizes.values())
    if packed.dtype != torch.uint8 or tuple(packed.shape) != ((total + 7) // 8,):
        raise LegolmError(f"{KEPT} is {packed.dtype} of shape {tuple(packed.shape)}; must be uint8, a bit an entry")
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=total).astype(bool))
    parts = bits.split(list(sizes.values()))  # type: ignore[no-untyped-call]
    return {key: part.view(shapes[key]) for key, part in zip(sizes, parts, strict=True)}
