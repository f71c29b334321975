"""Memory: what is free on the machine, and giving back what is not used any more."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

# What glibc's `mallopt` sets (malloc.h): free bytes at the heap's end that go back, and how many blocks may be mapped.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def available_bytes() -> int:
    """Memory that new processes can have."""
    return int(psutil.virtual_memory().available)


def total_bytes() -> int:
    """The machine's memory."""
    return int(psutil.virtual_memory().total)


def release_memory() -> None:
    """Free models that nobody uses any more, and give their memory back to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Give freed memory back to the system: glibc keeps gigabytes of it, above all in threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage among what is made in the context: imports make a million objects, and all of them stay.

    Each look at them takes a third of a second, and the process takes one when it ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc keep what is freed for as long as the context lasts, and give it back afterwards.

    Each step of training, each layer on calibration text, frees and takes the same gigabyte; handing its pages back and
    forth costs more than the arithmetic on them.
    """
    libc = None
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
            libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
            libc.mallopt(_MMAP_MAX, 1 << 16)
        trim()
