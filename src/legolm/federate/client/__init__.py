"""A client: the runtime that answers, and the site that it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from legolm.federate.client.fetch import block_folder
from legolm.federate.client.resident import HeldSite, Holdings, Resident
from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.secure import Keeping
from legolm.federate.client.site import Profile, Site, SiteOf, Split, only, simulated, simulated_roster

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

__all__ = [
    "ClientRuntime",
    "HeldSite",
    "Holdings",
    "Keeping",
    "Profile",
    "Resident",
    "Site",
    "SiteOf",
    "Split",
    "block_folder",
    "flower_app",
    "only",
    "serve",
    "simulated",
    "simulated_roster",
]


def serve(server: str, ca: Path | None, held: Holdings, note: Callable[[str], None]) -> None:
    """Be the device in `held.home` of the federation at `server` (host:port), until interrupted. Needs Flower."""
    from legolm.federate.client.device import serve as serve_device

    serve_device(server, ca, held, note)


def flower_app(path: Path) -> ClientApp:
    """All clients of the simulated run in the folder `path` as a Flower ClientApp. Needs Flower."""
    from legolm.federate.client.app import client_app

    return client_app(path)
