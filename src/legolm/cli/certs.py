"""`legolm certs`: the certificates and keys of a federation of devices."""

from __future__ import annotations

import socket
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

certs = typer.Typer(no_args_is_help=True, help="Certificates and keys of a federation of devices.")
Home = Annotated[Path, typer.Argument(help="the federation's folder, on the server")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="name or address by which devices reach the server; repeat")
]


@certs.command()
def init(home: Home, host: Hosts = None) -> None:
    """Make a certificate authority and the server's certificate."""
    from legolm.trust import CA, check_hosts, make_authority, make_server

    hosts = _hosts(host)
    check_hosts(hosts)
    make_authority(home)
    make_server(home, hosts)
    typer.echo(f"{home}: a certificate authority, and a certificate for {', '.join(hosts)}")
    typer.echo(
        f"give each device {home / CA}, and register its key: legolm devices add {quote(str(home))} NAME KEY.pub"
    )


@certs.command()
def server(home: Home, host: Hosts = None) -> None:
    """Make the server's certificate anew: for other hosts, or because it expires."""
    from legolm.trust import make_server

    hosts = _hosts(host)
    make_server(home, hosts)
    typer.echo(f"{home}: a certificate for {', '.join(hosts)}")


@certs.command()
def client(
    home: Annotated[Path, typer.Argument(help="the device's folder, as in `legolm client --home`")],
    register: Annotated[Path | None, typer.Option(help="also register it in this federation's folder")] = None,
    name: Annotated[str | None, typer.Option(help="with --register: its name; the folder's if not given")] = None,
) -> None:
    """Make a device's key. With --register, for a trial on one machine: register it, and copy the CA to the device."""
    import shutil

    from legolm.errors import LegolmError
    from legolm.trust import CA, PUBLIC, add_device, check_federation, make_key

    if name is not None and register is None:
        raise LegolmError("--name: is for --register; the server gives the name otherwise (legolm devices add)")
    if register is not None:
        check_federation(register, "--register")
    public = make_key(home)
    if register is None:
        typer.echo(f"{home}: a key; give {public} to the server, and get its {CA} into {home}")
        return
    device = add_device(register, name or home.resolve().name, home / PUBLIC)
    shutil.copyfile(register / CA, home / CA)
    typer.echo(f"{home}: the key of device {device.name!r}, registered in {register}")


def _hosts(given: list[str] | None) -> list[str]:
    return list(dict.fromkeys([*(given or ()), "localhost", "127.0.0.1", "::1", *([] if given else [_own_name()])]))


def _own_name() -> str:
    """This machine's name where a certificate can have it."""
    name = socket.gethostname()
    return name if name.isascii() and not set(name) & set(" _/:@") and name else "localhost"
