"""`legolm client`: a device of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def client(
    server: Annotated[str, typer.Option(help="HOST:PORT of the federation's server")],
    home: Annotated[Path, typer.Option(help="folder of this device: its key, blocks, state and replies")],
    data: Annotated[list[str], typer.Option(help="file of its rows, which stay here; repeat")],
    ca: Annotated[Path | None, typer.Option(help="the server's ca.pem; needed once")] = None,
    block: Annotated[list[Path] | None, typer.Option(help="folder of a block that is here already; repeat")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="where products run")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Take part in a federation with the rows of this device, until stopped."""
    from legolm.federate.client import Holdings, Profile, serve

    note = typer.echo
    serve(server, ca, Holdings(home, tuple(data), tuple(block or ()), Profile(device, threads)), note)
