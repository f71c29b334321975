"""`legolm report`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write `report.html` again from `summary.json`; of a run that has moved, the adapters' paths too."""
    from legolm.report import write_report
    from legolm.runs import RunDir, Summary, point_adapters

    write_report(Summary.read(folder), folder / "report.html")
    typer.echo(folder / "report.html")
    for adapter in point_adapters(RunDir(folder)):
        typer.echo(adapter)
