"""A relay: a device to its server, a server to the devices of its region, and one change for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from legolm.config import SuperLinkConfig
from legolm.federate.relay.region import Relay

__all__ = ["Relay", "serve"]


def serve(
    server: str,
    ca: Path | None,
    home: Path,
    region: SuperLinkConfig,
    note: Callable[[str], None],
    away_s: float | None = None,
) -> None:
    """Be the relay in the folder `home` between `server` (host:port) and the devices registered in `region.home`.

    Until interrupted. A device that is not online for `away_s` is not waited for. Needs Flower. Raises `LegolmError`
    as a device and as a server do.
    """
    from legolm.federate.relay.process import serve as serve_process

    serve_process(server, ca, home, region, note, away_s)
