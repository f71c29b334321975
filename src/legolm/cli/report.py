"""`legolm report`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.errors import LegolmError


def report(folder: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write `report.html` again from `summary.json`."""
    from legolm.report import write_report
    from legolm.system import read_json

    if not (folder / "summary.json").is_file():
        raise LegolmError(f"run folder {folder}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    summary = read_json(
        folder / "summary.json", "machine", "blocks", "clients", "history", "llm", "seconds", "versions"
    )
    write_report(summary, folder / "report.html")
    typer.echo(folder / "report.html")
