"""`legolm devices`: the register of the devices that a federation lets in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

devices = typer.Typer(no_args_is_help=True, help="The register of the devices that a federation lets in.")


def _federation(home: Path) -> Path:
    from legolm.trust import check_federation

    check_federation(home)
    return home


Home = Annotated[Path, typer.Argument(help="the federation's folder, on the server", callback=_federation)]
Name = Annotated[str, typer.Argument(help="its name: the client's id in the config")]


@devices.command()
def add(
    home: Home,
    name: Name,
    key: Annotated[Path, typer.Argument(help="the device's public key, device.pub")],
    days: Annotated[float | None, typer.Option(min=0, help="days until the key expires; never if not given")] = None,
) -> None:
    """Let a device in. A running federation knows it at once."""
    from legolm.trust import add_device

    device = add_device(home, name, key, days)
    typer.echo(
        f"device {device.name!r} is registered" + (f" until {device.expires:%Y-%m-%d}" if device.expires else "")
    )


@devices.command(name="list")
def list_devices(home: Home) -> None:
    """Every device that was ever let in."""
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    from legolm.trust import read_devices

    table = Table("device", "added", "expires", "state")
    for one in read_devices(home):
        expires = f"{one.expires:%Y-%m-%d}" if one.expires else "never"
        table.add_row(one.name, f"{one.added:%Y-%m-%d}", expires, one.refused(datetime.now(UTC)) or "let in")
    Console().print(table)


@devices.command()
def roster(
    home: Home,
    out: Annotated[Path, typer.Option(help="the file to write; give it to every device (legolm client --roster)")],
) -> None:
    """The identities of all devices, for secure sums. Give it to devices by another way than the federation's own."""
    from legolm.trust import roster as identities
    from legolm.trust import write_roster

    write_roster(home, out)
    typer.echo(f"{out}: the identities of {len(identities(home))} devices")


@devices.command()
def revoke(home: Home, name: Name) -> None:
    """Keep a device out from now on. A running federation knows it at once."""
    from legolm.trust import revoke_device

    revoke_device(home, name)
    typer.echo(f"device {name!r} is kept out from now on")
