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
    """A chosen function, what must be installed for it, what it refuses before any weight is read, and what sends on
    what is written.
    """

    name: str
    write: Write
    check: Callable[[Source], None]
    publish: Callable[[Path], list[str]]
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


def _nothing(source: Source, **_: Any) -> None:
    """Of a target that holds every model."""


def _nowhere(out: Path, **_: Any) -> list[str]:
    """Of a target that stays here."""
    return []


def exporter(
    name: str,
    packages: tuple[str, ...] = (),
    extra: str | None = None,
    check: Callable[..., None] = _nothing,
    publish: Callable[..., list[str]] = _nowhere,
) -> Callable[[Callable[..., list[str]]], Entry[Target]]:
    """Register a target under the name that `--to` takes: `f(source, out, *, own settings)`.

    `packages` are what it imports, and `extra` brings them; `check(source, **settings)` raises `LegolmError` for what
    it cannot hold, of which no weights may be there yet; `publish(out, **settings)` sends on what is written, and gives
    lines too. Raises `LegolmError` for a taken name and another signature.
    """

    def register(function: Callable[..., list[str]]) -> Entry[Target]:
        def make(**settings: Any) -> Target:
            where = f"target {name!r}"
            write, look = partial(guarded(where, function), **settings), partial(guarded(where, check), **settings)
            return Target(name, write, look, partial(guarded(where, publish), **settings), packages, extra)

        return EXPORTERS.register(name, function, make, ("source", "out"))

    return register
