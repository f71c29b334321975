"""Weights that are NaN or infinite, found where they are read: one spoils every loss, and nobody sees whence."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from legolm.errors import LegolmError
from legolm.models.checkpoint import SAVE_AGAIN
from legolm.system import file_state, open_tensors


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The least and the largest tell, in a tenth of `isfinite`'s time."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # NaN if any entry is
    return bool(least.isfinite() and most.isfinite())


def check_finite(name: str, tensor: Tensor, file: Path) -> None:
    """Raise `LegolmError` that names the tensor and its file where it is not finite."""
    if not finite(tensor):
        raise LegolmError(f"model: {file}: tensor {name} is not finite (NaN or infinite); take another checkpoint")


def check_files(files: Iterable[Path]) -> None:
    """Read weight files. Raises `LegolmError` as above, for the first such tensor."""
    for file in files:
        _check_file(file, file_state(file))


@lru_cache(maxsize=64)
def _check_file(file: Path, _state: str) -> None:
    """Once as long as it is the same: each plan of a study asks."""
    with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            check_finite(name, handle.get_tensor(name), file)
