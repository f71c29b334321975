"""`legolm status`: a run as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LOOK_S = 1.0


def status(
    folder: Annotated[Path, typer.Argument(help="run folder")],
    json: Annotated[bool, typer.Option("--json", help="one JSON object, and stop")] = False,
) -> None:
    """Show a run's rounds and devices, live on a terminal until it is finished."""
    import time
    from json import dumps

    from rich.console import Console
    from rich.live import Live

    from legolm.report import read_status, show_status

    found = read_status(folder)
    if json:
        typer.echo(dumps(found))
        return
    console = Console()
    if not console.is_terminal:
        console.print(show_status(found))
        return
    with Live(show_status(found), console=console, auto_refresh=False) as live:
        while not found["finished"]:
            time.sleep(LOOK_S)
            found = read_status(folder)
            live.update(show_status(found), refresh=True)
