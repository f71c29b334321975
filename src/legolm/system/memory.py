"""Memory: what is free on the machine, and giving back what is not used any more."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# What glibc's `mallopt` sets (malloc.h): free bytes at the heap's end that go back, and how many blocks may be mapped.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def available_bytes() -> int:
    """Memory that new processes can have: of the machine's, and of each control group's that this process is in."""
    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())]))


def total_bytes() -> int:
    """The machine's memory, or that of the smallest control group."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def _limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """What each control group (version 1 or 2) with a limit may take, and what it has, bytes.

    Containers and batch systems set them, the kernel kills what goes beyond, and the machine's memory says nothing of
    them. Files that were read and can be dropped are in no need of it. The groups' paths are those of the machine,
    where a container may see its own as the first: what is not there is passed over.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = mounted / "memory" if controllers else mounted
            names = ("limit_in_bytes", "usage_in_bytes", "total_") if controllers else ("max", "current", "")
            own = root / path.lstrip("/")
            for folder in (own, *(one for one in own.parents if one.is_relative_to(root))):
                with contextlib.suppress(OSError, ValueError):  # no such file, or `max`: none
                    limit, used = (int((folder / f"memory.{name}").read_text()) for name in names[:2])
                    found.append((limit, used - _droppable(folder / "memory.stat", names[2])))
    return found


def _droppable(file: Path, prefix: str) -> int:
    """Bytes of files in a control group's memory, those in use, too; nothing where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", file.read_text(), re.MULTILINE)))
    return 0


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
