"""`legolm relay`: a region's devices as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import finite, keeping


def relay(
    server: Annotated[str, typer.Option(help="HOST:PORT of the federation's server")],
    home: Annotated[Path, typer.Option(help="folder of this relay: its key, its block, replies")],
    region: Annotated[Path, typer.Option(help="folder of its region: certificates and devices (legolm certs init)")],
    ca: Annotated[Path | None, typer.Option(help="the server's ca.pem; needed once")] = None,
    host: Annotated[str, typer.Option(help="where the region's devices find it")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="where the region's devices find it")] = 8001,
    away_s: Annotated[
        float | None,
        typer.Option(min=1, callback=finite, help="a device that is not online for so long is not waited for"),
    ] = None,
) -> None:
    """Answer a federation's server for the devices of a region, with the sum of what they send, until stopped."""
    from legolm.config import SuperLinkConfig
    from legolm.federate.relay import serve

    with keeping():
        serve(server, ca, home, SuperLinkConfig(home=str(region), host=host, port=port), typer.echo, away_s)
