"""Memory: what is free on the machine, and giving back what is not used any more."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import psutil


def available_bytes() -> int:
    """Memory that new processes can have."""
    return int(psutil.virtual_memory().available)


def release_memory() -> None:
    """Give freed memory back to the system: once models come and go, glibc keeps gigabytes, above all in threads."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)
