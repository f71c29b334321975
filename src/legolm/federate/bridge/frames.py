"""Frames on a local socket: a JSON header and bytes. The standard library only, for it travels in the Flower app."""

from __future__ import annotations

import json
import os
import socket
import struct
from types import TracebackType
from typing import Any

LENGTHS = struct.Struct(">QQ")
MAX_HEADER, MAX_BODY = 16 << 20, 2 << 30


class Link:
    """One end of a connection: sends and receives whole frames, one after the other."""

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Raises `OSError` when the other end is gone."""
        head = json.dumps(header).encode()
        self._socket.sendall(LENGTHS.pack(len(head), len(body)) + head)
        self._socket.sendall(body)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Raises `OSError` when the other end is gone, says nothing in time, or sends what is no frame."""
        head, body = LENGTHS.unpack(self._exactly(LENGTHS.size))
        if head > MAX_HEADER or body > MAX_BODY:
            raise OSError("a frame is too large")
        try:
            header = json.loads(self._exactly(head))
        except ValueError as error:
            raise OSError(f"a frame is broken ({error})") from None
        if not isinstance(header, dict):
            raise OSError("a frame is broken")
        return header, self._exactly(body)

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = self._socket.recv(min(count - len(found), 1 << 20))
            if not part:
                raise ConnectionResetError("the other end is gone")
            found += part
        return bytes(found)

    def fileno(self) -> int:
        """Of the socket, for `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        """The other end is told."""
        self._socket.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def connect(path: str, timeout: float | None = None) -> Link:
    """To who listens at `path`. Raises `OSError` where nobody does."""
    found = socket.socket(socket.AF_UNIX)
    try:
        found.settimeout(timeout)
        found.connect(path)
    except OSError:
        found.close()
        raise
    return Link(found)


def listen(path: str) -> socket.socket:
    """A socket of this user only. Raises `OSError` for a path that is too long or taken."""
    found = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        found.bind(path)
        found.listen()
    except OSError:
        found.close()
        raise
    finally:
        os.umask(before)
    return found
