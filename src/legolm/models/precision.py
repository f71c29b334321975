"""In what the matrix products run: measured, not guessed; and on which device."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Literal

import torch

from legolm.config import Device, Precision
from legolm.errors import LegolmError
from legolm.system import available_bytes

SIZE = 768
"""Rows and columns of the measured product, about those of a small model's layers; four times as many on an
accelerator, which answers a smaller product no sooner in bf16 than in float32."""


DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of matrix products. Raises `LegolmError` for a precision that there is not."""
    if precision not in DTYPES:
        raise LegolmError(f"precision = {precision!r}: must be {' or '.join(DTYPES)}")
    return DTYPES[precision]


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[None]:
    """`bf16`: matrix products in bfloat16 by autocast; `fp32`: as the weights are. Raises as `dtype_of` does."""
    low = dtype_of(precision) == torch.bfloat16
    context: AbstractContextManager[None] = torch.autocast(device, torch.bfloat16, enabled=low)
    return context


def choose_precision(wanted: Precision | Literal["auto"], device: Device = "auto") -> Precision:
    """`auto`: bf16 where a bf16 matrix product takes less time than a float32 one on this device, else fp32."""
    if wanted != "auto":
        return wanted
    where = choose_device(device)
    return "bf16" if _seconds(torch.bfloat16, where) < _seconds(torch.float32, where) else "fp32"


def choose_device(wanted: Device) -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU. Raises `LegolmError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[wanted]:
        raise LegolmError(f"device = {wanted!r}: is not here, or this build of torch has no part for it; take auto")
    return torch.device(wanted)


def free_bytes(device: torch.device) -> int:
    """Memory that a model there can have; what torch holds of a card and does not use is free, too."""
    if device.type != "cuda":
        return available_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def product_speed(precision: Precision, device: torch.device) -> float:
    """Operations a second of a matrix product, measured."""
    return 2 * _size(device) ** 3 / _seconds(dtype_of(precision), device)


def _size(device: torch.device) -> int:
    return SIZE if device.type == "cpu" else 4 * SIZE


@lru_cache
def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product, the best of five."""
    size = _size(device)
    x = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        float((x @ x)[0, 0])  # reading a value waits for the device
        times.append(time.perf_counter() - began)
    return min(times[1:])
