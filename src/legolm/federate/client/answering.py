"""Answer requests that others pass on: one at a time, each reply kept, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any

from legolm.errors import LegolmError, PublicError, brief
from legolm.federate.bridge import Link
from legolm.federate.client.fetch import UnreachableError
from legolm.federate.wire import Welcome, kind_of, plain, read_welcome
from legolm.runs import Kept
from legolm.system import DiskFullError, disk_full

KEPT = 32
"""Replies kept of a run: as many as may be asked for again."""
OWN = "something is wrong with its block, its rows or its machine; its own output says what"
"""All that a server is told of an error that may quote them."""
ROOM_S = 5.0
"""From one look at a full disk to the next."""


class Answering(ABC):
    """In the folder `home`. `name` is who it is to its server; None where that does not say so."""

    def __init__(self, home: Path, name: str | None, note: Callable[[str], None]) -> None:
        self._home, self._name, self._note = home, name, note
        self._lock = threading.Lock()

    def answer(self, welcome: str, request: bytes, left_s: float | None = None) -> tuple[dict[str, Any], bytes]:
        """A header, empty where all is well, and the reply; the same bytes have the same reply, as long as what it is
        made of is the same.

        Work stops itself in time for a reply within `left_s` seconds.
        `error` says what is wrong with the request, of the device's own only that something is; `again` that it may be
        asked again.
        """
        came = time.monotonic()
        try:
            told = read_welcome(welcome)
            with self._lock:
                if self._name is not None and told.client != self._name:
                    raise PublicError(f"client {told.client}: this device is {self._name!r}")
                if (said := self._at_once(request)) is not None:
                    return {}, said
                return {}, self._kept(told, welcome, request, None if left_s is None else came + left_s)
        except UnreachableError as error:
            return {"again": plain(error)}, b""
        except LegolmError as error:
            if disk_full(error):
                return self._full(error)
            self._note(f"a request was refused: {error}")
            return {"error": plain(error) if isinstance(error, PublicError) else OWN}, b""
        except Exception as error:  # of torch, say: without memory it raises what it likes
            if disk_full(error):
                return self._full(error)
            self._note(f"a request failed: {type(error).__name__}: {brief(error)}")
            return {"error": plain(f"{type(error).__name__}: {OWN}")}, b""

    def serve(self, listener: socket) -> None:
        """Answer who connects, until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Link(connection),), daemon=True).start()

    def _at_once(self, request: bytes) -> bytes | None:
        """What is answered anew each time; None for all that is kept. Raises `LegolmError` for what never is."""
        return None

    @abstractmethod
    def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
        """The reply; there may be no more time after `until` (of `time.monotonic`).

        Raises `UnreachableError` for what may be asked again, `LegolmError` for what is wrong.
        """

    def _about(self, told: Welcome) -> bytes:
        """What a reply is made of beside the request, as a hash."""
        return b""

    def _folder(self, run: str) -> Path:
        return self._home / "runs" / run

    def _kept(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
        """The reply of before, or one that is kept from now on."""
        kept, key = Kept(self._folder(told.run) / "replies", KEPT), self._about(told) + hashlib.sha256(request).digest()
        if (known := kept.get(key)) is not None:
            return known
        began = time.monotonic()
        reply = self._work(told, welcome, request, until)
        self._with_room(lambda: kept.put(key, reply))
        self._note(f"{kind_of(request)}: answered in {time.monotonic() - began:.1f} s")
        return reply

    def _with_room(self, write: Callable[[], None]) -> None:
        """Write what work has come to; where the disk is full it stays in memory until there is room."""
        said = False
        while True:
            try:
                write()
                return
            except DiskFullError as error:
                if not said:
                    self._note(f"{error}; what was made is in memory, and written when there is room")
                said = True
            time.sleep(ROOM_S)

    def _full(self, error: Exception) -> tuple[dict[str, Any], bytes]:
        self._note(f"{brief(error)}; a request waits until there is room")
        return {"again": "its disk is full"}, b""

    def _serve(self, link: Link) -> None:
        with link:
            try:
                header, request = link.receive()
                left = header.get("left_s")
                left_s = float(left) if isinstance(left, int | float) else None
                link.send(*self.answer(str(header.get("welcome", "")), request, left_s))
            except OSError:
                return  # who asked is gone; the reply is kept
