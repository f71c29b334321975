"""Export: write, load in the runtime, compare, and only then let the result appear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legolm.composition import Composition
from legolm.config import EXPORTERS
from legolm.errors import LegolmError
from legolm.export import adapter, gguf, gguf_adapter, hf, ollama, onnx, sparse  # noqa: F401 (they register themselves)
from legolm.export.source import composed_source, open_source
from legolm.export.target import Target
from legolm.models import count_parameters, folder_bytes
from legolm.system import appearing, check_new, check_room

WIDEST = 4
"""Bytes a parameter, of the widest target and of what is made on the way."""


@dataclass(frozen=True)
class Exported:
    """What was written: its path, its bytes, and what is to be said of it, a line each."""

    path: Path
    bytes: int
    lines: list[str]


def export(
    name: str, to: str, out: Path, with_adapter: Path | None = None, settings: Mapping[str, Any] | None = None
) -> Exported:
    """Write the model of this name (`find_model`) for the runtime `to`, and compare what it computes there.

    Raises `LegolmError` for a target that cannot hold the model, a runtime that is not installed, an output that is
    there, a full disk, and a result that differs; nothing is left then. What cannot be sent on stays.
    """
    target = target_of(to, settings or {})
    target.need()
    check_new(out)
    with open_source(name, with_adapter, out) as source:
        target.check(source)
        check_room(out, WIDEST * count_parameters(source.folder))
        with appearing(out) as made:
            lines = target.write(source, made)
    lines += target.publish(out)
    return Exported(out, folder_bytes(out) if out.is_dir() else out.stat().st_size, lines)


def check_export(
    name: str,
    to: str,
    beside: Path,
    with_adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    field: str = "--to",
) -> None:
    """Raise `LegolmError` for what `export` refuses before any weight is read; `field` is what names the settings."""
    target = target_of(to, settings or {}, field)
    with open_source(name, with_adapter, beside) as source:
        target.check(source)


def check_composed(
    wanted: Composition, out: Path, to: str, with_adapter: Path | None, settings: Mapping[str, Any]
) -> None:
    """The same of what is to be composed into `out` before it is exported, and where its runtime is not installed."""
    target = target_of(to, settings)
    target.need()
    target.check(composed_source(wanted, out, with_adapter))


def target_of(to: str, settings: Mapping[str, Any], field: str = "--to") -> Target:
    """What writes this format. Raises `LegolmError` for an unknown one, and for settings that it does not take, which
    are named by `field`.
    """
    try:
        target: Target = EXPORTERS.entry(to).make(**EXPORTERS.check(to, dict(settings), (), ()))
    except ValueError as error:
        raise LegolmError(f"{field}: {error}") from None
    return target
