"""What passes between devices and their server, in the open, and whether rows are in it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from legolm.system import free_port
from legolm.trust import server_files


class Tap:
    """Stands before a federation's server with its certificate; `up` and `down` have all bytes, by connection.

    One event loop has all connections: a TLS socket is for one thread at a time, or OpenSSL ends the process.
    """

    def __init__(self, home: Path, port: int) -> None:
        ca, certificate, key = server_files(home)
        self.port, self._to = free_port(), port
        self._outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._outer.load_cert_chain(certificate, key)
        self._inner = ssl.create_default_context(cafile=str(ca))
        self._open: set[asyncio.StreamWriter] = set()
        self._cut_until = 0.0
        self.up: list[bytearray] = []
        self.down: list[bytearray] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listens = asyncio.start_server(self._carry, "127.0.0.1", self.port, ssl=self._outer)
        asyncio.run_coroutine_threadsafe(listens, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self, seconds: float) -> None:
        """Nothing passes for so long; what is open ends."""

        def close() -> None:
            self._cut_until = time.monotonic() + seconds
            for one in self._open:
                one.close()

        self._loop.call_soon_threadsafe(close)

    def say_again(self, path: bytes) -> int:
        """Send the last whole request to this path of each connection once more; how many there were."""

        async def send(content: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._to, ssl=self._inner)
            writer.write(content)
            await asyncio.wait_for(reader.read(1 << 16), 10)
            writer.close()

        asked = [one for up in list(self.up) if (one := last_request(bytes(up), path))]
        for content in asked:
            asyncio.run_coroutine_threadsafe(send(content), self._loop).result()
        return len(asked)

    async def _carry(self, inside: asyncio.StreamReader, outside: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._cut_until:
            outside.close()
            return
        with contextlib.suppress(OSError):  # either end may go at any time
            server, to = await asyncio.open_connection("127.0.0.1", self._to, ssl=self._inner)
            self._open |= {to, outside}
            await asyncio.gather(self._pass(inside, to, self.up), self._pass(server, outside, self.down))
            self._open -= {to, outside}
        outside.close()

    async def _pass(self, one: asyncio.StreamReader, two: asyncio.StreamWriter, kept: list[bytearray]) -> None:
        kept.append(mine := bytearray())
        with contextlib.suppress(OSError):
            while part := await one.read(1 << 16):
                mine += part
                two.write(part)
                await two.drain()
        two.close()


def last_request(sent: bytes, path: bytes) -> bytes:
    """The last whole HTTP request to `path` in what a connection sent; empty where there is none."""
    at = sent.rfind(b"POST " + path + b" ")
    head = sent.find(b"\r\n\r\n", at) + 4
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", sent[max(at, 0) : head])
    end = head + int(length[1]) if length else 0
    return sent[at:end] if 0 <= at < end <= len(sent) else b""


def secrets(ids: list[int], text: str, length: int = 8) -> Iterator[bytes]:
    """Each sequence of so many tokens of one row as bytes: as text, where each token is a letter, and as numbers."""
    for at in range(len(ids) - length + 1):
        yield text[at : at + length].encode()
        for kind in ("<u2", "<i4", "<i8", ">i4"):
            yield np.array(ids[at : at + length], dtype=kind).tobytes()


def found(content: bytes, wanted: Collection[bytes]) -> list[bytes]:
    """Those of `wanted`, each of 8 bytes or more, that are in `content`."""
    octets = np.frombuffer(content, dtype=np.uint8).astype(np.uint16)
    pairs = octets[:-1] | (octets[1:] << 8)  # the two bytes at each place
    there: list[bytes] = []
    for size in {len(one) for one in wanted}:
        alike = {one for one in wanted if len(one) == size}
        places = np.ones(max(len(content) - size + 1, 0), dtype=bool)
        for part in range(0, 8, 2):  # of the many places few are left
            table = np.zeros(1 << 16, dtype=bool)
            table[[int.from_bytes(one[part : part + 2], "little") for one in alike]] = True
            places &= table[pairs[part : part + len(places)]]
        there += [one for at in np.flatnonzero(places).tolist() if (one := content[at : at + size]) in alike]
    return there
