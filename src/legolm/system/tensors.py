"""safetensors files that others wrote: what their headers say is checked before anything is read of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from legolm.errors import LegolmError, brief
from legolm.system.files import unreadable

MAX_HEADER = 16 << 20
"""Bytes of a file's header: a hundred thousand tensors fit."""
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor; `dtype` in the format's words: F32, BF16, I64."""

    dtype: str
    shape: tuple[int, ...]


@contextmanager
def open_tensors(path: Path, what: str, way_out: str) -> Iterator[Any]:
    """The file as `safetensors.safe_open` gives it.

    Raises `LegolmError`, which begins with `what` and ends with `way_out`, for a file that is broken, and for what the
    block makes of its content with a `KeyError`, `TypeError`, `ValueError` and such; and for one that cannot be read.
    """
    try:
        _header(path, file_state(path))
        with safe_open(path, framework="pt") as handle:
            yield handle
    except FileNotFoundError:
        raise LegolmError(f"{what}{path}: no such file; {way_out}") from None
    except KeyError as error:
        raise LegolmError(f"{what}{path}: is broken (it has no {brief(error)}); {way_out}") from None
    except OSError as error:
        raise unreadable(f"{what}{path}", error) from None
    except (SafetensorError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise LegolmError(f"{what}{path}: is broken ({brief(error)}); {way_out}") from None


def stored_tensors(path: Path, what: str, way_out: str) -> Mapping[str, Stored]:
    """What the file holds, by name. Raises `LegolmError` as `open_tensors` does."""
    with open_tensors(path, what, way_out):
        return _header(path, file_state(path))


def file_state(path: Path) -> str:
    """Another one after any change of the file: unlike its own time, its inode's (`ctime`) cannot be set back."""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def strict_json(text: str | bytes) -> Any:
    """The value. Raises `ValueError`, also for a key that an object has twice and for what is nested too deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def strict_decoder(parse_float: Callable[[str], Any]) -> json.JSONDecoder:
    """As `strict_json`, for many values: what is nested too deep is a `RecursionError`."""
    return json.JSONDecoder(object_pairs_hook=_once, parse_float=parse_float)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name in counts if counts[name] > 1)!r} is there twice")
    return found


@lru_cache(maxsize=256)
def _header(path: Path, _state: str) -> Mapping[str, Stored]:
    """Types and sizes only: that offsets fit shapes and the file is what the library checks."""
    if not path.is_file():  # a named pipe never ends
        raise ValueError("it is no file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header has {size} bytes; at most {MAX_HEADER} are read")
        raw = file.read(size)
    if len(raw) < size:
        raise ValueError(f"it ends before its header does, after {len(raw)} of {size} bytes")
    header = strict_json(raw)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"its header says nothing of {name}")
        shape = entry.get("shape")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or any(type(n) is not int for n in shape):
            raise ValueError(f"the shape of {name} is none")
        found[name] = Stored(entry["dtype"], tuple(shape))
    return found
