"""A client: the runtime that answers, and the site that it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from legolm.data import read_rows
from legolm.federate.client.answering import Answering
from legolm.federate.client.fetch import Piece, UnreachableError, block_folder, find_block
from legolm.federate.client.resident import HeldSite, Holdings, Resident
from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.secure import Keeping
from legolm.federate.client.site import Profile, Site, SiteOf, Split, only, simulated, simulated_roster
from legolm.federate.client.state import keep_state, read_state
from legolm.trust import read_roster

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

__all__ = [
    "Answering",
    "ClientRuntime",
    "HeldSite",
    "Holdings",
    "Keeping",
    "Piece",
    "Profile",
    "Resident",
    "Site",
    "SiteOf",
    "Split",
    "UnreachableError",
    "block_folder",
    "find_block",
    "flower_app",
    "keep_state",
    "only",
    "read_state",
    "serve",
    "simulated",
    "simulated_roster",
    "stay",
]


def serve(server: str, ca: Path | None, held: Holdings, note: Callable[[str], None]) -> None:
    """Be the device in `held.home` of the federation at `server` (host:port), until interrupted. Needs Flower.

    Raises `LegolmError` for bad rows, and as `stay`.
    """
    for _ in read_rows(held.data, "--data"):
        pass  # bad rows are named now, not when somebody asks
    if held.roster is not None:
        read_roster(held.roster)
    stay(server, ca, held.home, note, lambda name, piece: Resident(held, name, piece, note))


def stay(
    server: str,
    ca: Path | None,
    home: Path,
    note: Callable[[str], None],
    answering: Callable[[str | None, Piece], Answering],
) -> None:
    """Be a device in the folder `home`, and answer by what `answering` makes of its name and the way to its blocks.

    Raises `LegolmError` when it is kept out, and for what cannot work. Needs Flower.
    """
    from legolm.federate.client.device import stay as stay_device

    stay_device(server, ca, home, note, answering)


def flower_app(path: Path) -> ClientApp:
    """All clients of the simulated run in the folder `path` as a Flower ClientApp. Needs Flower."""
    from legolm.federate.client.app import client_app

    return client_app(path)
