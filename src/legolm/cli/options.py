"""What several commands share: their options, and the checks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from legolm.errors import LegolmError

Config = Annotated[Path, typer.Argument(help="YAML config of the run; see examples/")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of matrix products")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a value: a.b=value; may be repeated")]


def check_new(out: Path) -> None:
    """Raise `LegolmError` when `--out` is there or cannot be made: before the work, not after it."""
    from legolm.system import check_room

    if out.exists():
        raise LegolmError(f"--out {out}: is already there; give another one")
    check_room(out)


def task_names(listed: str | None) -> list[str]:
    """The names in `--tasks a,b`, none when it is not given. Raises `LegolmError` when it is given and names none."""
    names = [name.strip() for name in (listed or "").split(",") if name.strip()]
    if listed is not None and not names:
        raise LegolmError(f"--tasks {listed!r}: names no task; write names with commas between them")
    return names
