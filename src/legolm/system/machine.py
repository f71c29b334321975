"""What a run ran on."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("legolm", "torch", "transformers", "peft", "safetensors", "flwr", "numpy")


def machine() -> dict[str, Any]:
    """What the run ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's result."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


@cache  # each look reads the package's metadata, and every config that is loaded asks
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
