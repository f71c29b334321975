"""`legolm client`: a device of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from legolm.cli.options import finite, keeping


def client(
    server: Annotated[str, typer.Option(help="HOST:PORT of the federation's server")],
    home: Annotated[Path, typer.Option(help="folder of this device: its key, blocks, state and replies")],
    data: Annotated[list[str], typer.Option(help="file of its rows, which stay here; repeat")],
    ca: Annotated[Path | None, typer.Option(help="the server's ca.pem; needed once")] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="folder or hub id of a block, used where its files are the run's; repeat")
    ] = None,
    memory_mb: Annotated[
        float | None,
        typer.Option(min=1, callback=finite, help="memory that training may take, where the server asks (block: auto)"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="where products run")] = "auto",
    roster: Annotated[
        Path | None, typer.Option(help="identities of all devices (legolm devices roster), for secure sums")
    ] = None,
    colluders: Annotated[
        int, typer.Option(min=1, help="devices that may tell the server all they know; sums open to them are refused")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Take part in a federation with the rows of this device, until stopped."""
    from legolm.federate.client import Holdings, Profile, block_folder, serve

    blocks, profile = tuple(map(block_folder, block or ())), Profile(device, threads)
    held = Holdings(home, tuple(data), blocks, profile, memory_mb, roster, colluders)
    with keeping():
        serve(server, ca, held, typer.echo)
