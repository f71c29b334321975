"""The one interface that engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from legolm.config import RunConfig
from legolm.rundir import RunDir


@dataclass(frozen=True)
class Request:
    """Bytes for one client (`legolm.wire`)."""

    client: str
    content: bytes


@dataclass(frozen=True)
class Reply:
    """The answer to the request of this index: bytes, or why there are none."""

    index: int
    content: bytes = b""
    error: str = ""


Exchange = Callable[[Sequence[Request]], Iterator[Reply]]
"""Send requests and give each reply as it comes, in any order."""

Body = Callable[[Exchange], None]
Engine = Callable[[RunDir, RunConfig, int, Body], None]
"""(run folder, config, actors at once, body): call `body` once with a way to reach the clients."""
