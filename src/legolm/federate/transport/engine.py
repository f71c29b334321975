"""The one interface that engines share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import rmtree
from typing import Protocol

from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.runs import RunDir, Traffic
from legolm.system import sockets_place

RAY_SOCKETS = len("/legolm-ray-12345678/session_2026-11-29_19-10-10_123456_4194304/sockets/plasma_store")
"""Bytes of the longest path of Ray's sockets, below the folder for temporary ones."""


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


def ray_place() -> str:
    """Where the folder of Ray's session is made. Raises `LegolmError` where there is no place for its sockets."""
    return sockets_place(RAY_SOCKETS, os.environ.get("RAY_TMPDIR"))


def check_engine(config: RunConfig) -> None:
    """Raise `LegolmError` where the configured engine cannot work on this machine."""
    if config.federation.engine != "flower":
        return
    if find_spec("ray") is None:
        raise LegolmError(
            "federation.engine 'flower': its simulation is not installed; "
            "run: pip install 'legolm[simulation]', or set federation.engine=local"
        )
    ray_place()


class Exchange(Protocol):
    """A way to reach the clients."""

    def __call__(self, requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        """Take requests as clients can be asked, and give each reply as it comes, in any order.

        A client that has not answered after `deadline_s` seconds gives an error instead; its late answer is dropped.
        """


def counted(exchange: Exchange, sent: dict[str, Traffic]) -> Exchange:
    """The same, that adds to `sent` what passes between the server and each client, however often it is asked.

    A reply that an engine kept counts as on the day when it came: a run that was killed ends with the same bytes.
    """

    def ask(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        asked: list[tuple[str, int]] = []

        def seen() -> Iterator[Request]:
            for one in requests:
                asked.append((one.client, len(one.content)))
                yield one

        for reply in exchange(seen(), deadline_s):
            if 0 <= reply.index < len(asked):
                client, down = asked[reply.index]
                sent[client] = sent.get(client, Traffic(up=0, down=0)) + Traffic(up=len(reply.content), down=down)
            yield reply

    return ask


def late(deadline_s: float) -> str:
    """The error of a reply that did not come in time."""
    return f"late: no answer within federation.deadline_s, {deadline_s:g} s"


@contextmanager
def forgetting(run: RunDir) -> Iterator[None]:
    """Clients' secrets begin and end with the engine, as a process's memory does."""
    rmtree(run.secrets, ignore_errors=True)
    try:
        yield
    finally:
        rmtree(run.secrets, ignore_errors=True)


Body = Callable[[Exchange], None]
Engine = Callable[[RunDir, RunConfig, int, Body], None]
"""(run folder, config, actors at once, body): call `body` once with a way to reach the clients."""
