"""What is exported and to what: a target is one typed function a file, registered by `@exporter`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from legolm.config import EXPORTERS, Entry, guarded
from legolm.errors import LegolmError
from legolm.export.source import Source

Write = Callable[[Source, Path], list[str]]
"""Write the source at a path that is not there yet, load it in its runtime, compare; gives lines to be said."""


@dataclass(frozen=True)
class Target:
    """A chosen function, and what must be installed for it."""

    name: str
    write: Write
    packages: tuple[str, ...]
    extra: str | None

    def need(self, what: str | None = None) -> None:
        """Raise `LegolmError` where what writes it or its runtime is not installed; `what` needs it, if not `--to`."""
        lacking = [one for one in self.packages if importlib.util.find_spec(one) is None]
        if lacking:
            raise LegolmError(
                f"{what or f'--to {self.name}'}: needs {lacking[0]}, which is not installed; run: pip install "
                f"'legolm[{self.extra}]'"
            )


def exporter(
    name: str, packages: tuple[str, ...] = (), extra: str | None = None
) -> Callable[[Callable[..., list[str]]], Entry[Target]]:
    """Register a target under the name that `--to` takes: `f(source, out, *, own settings)`.

    `packages` are what it imports, and `extra` brings them. Raises `LegolmError` for a taken name and for another
    signature.
    """

    def register(function: Callable[..., list[str]]) -> Entry[Target]:
        def make(**settings: Any) -> Target:
            return Target(name, partial(guarded(f"target {name!r}", function), **settings), packages, extra)

        return EXPORTERS.register(name, function, make, ("source", "out"))

    return register
