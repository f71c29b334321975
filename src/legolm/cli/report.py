"""`legolm report`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.errors import LegolmError


def report(folder: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write `report.html` again from `summary.json`."""
    from legolm.report import write_report
    from legolm.runs import Summary, read_record

    path = folder / "summary.json"
    if not path.is_file():
        raise LegolmError(f"run folder {folder}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    write_report(read_record(path, Summary), folder / "report.html")
    typer.echo(folder / "report.html")
