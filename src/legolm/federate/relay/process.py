"""`legolm relay`: both ends of a relay in one process. Its region's Flower is kept going also while nobody asks."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from legolm.config import SuperLinkConfig
from legolm.errors import LegolmError
from legolm.federate.client import Answering, Piece, stay
from legolm.federate.relay.region import Relay
from legolm.federate.transport import Asking, Flower, Reply, Request, Those
from legolm.trust import read_devices

LOOK_S = 2.0


def serve(
    server: str, ca: Path | None, home: Path, region: SuperLinkConfig, note: Callable[[str], None], away_s: float | None
) -> None:
    """Be the relay, until interrupted. Raises `LegolmError` as `Flower` and `stay` do."""
    home.mkdir(parents=True, exist_ok=True)
    folder = home.resolve() / "region"
    with Flower(folder / "flower", folder / "blocks", region, note) as flower:
        own = Region(folder, Path(region.home), flower, note, away_s)
        threading.Thread(target=own.watch, daemon=True).start()
        stay(server, ca, home, note, lambda name, piece: own.relay(home, name, piece))


class Region:
    """The devices of a region and a way to ask them. One thread at a time speaks with Flower."""

    def __init__(
        self, folder: Path, register: Path, flower: Flower, note: Callable[[str], None], away_s: float | None
    ) -> None:
        self._folder, self._register, self._flower, self._note = folder, register, flower, note
        self._away_s, self._lock, self._given = away_s, threading.Lock(), ""

    def relay(self, home: Path, name: str | None, piece: Piece) -> Answering:
        """What answers for the region."""
        found = Relay(home, name, piece, self.devices, self.exchange, self._give, self._note)
        those = Those(self._folder, self.devices, found.told, lambda: found.round, self._away_s)
        self._asking = Asking(those, self._flower, self._note)
        return found

    def devices(self) -> Collection[str]:
        """Who is let in now."""
        now = datetime.now(UTC)
        return [one.name for one in read_devices(self._register) if not one.refused(now)]

    def exchange(self, requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        """Ask the region's devices."""
        with self._lock:
            yield from self._asking.exchange(requests, deadline_s)

    def watch(self) -> None:
        """Keep all running while nobody is asked; where that cannot be, end this process."""
        while True:
            time.sleep(LOOK_S)
            if self._lock.acquire(blocking=False):
                try:
                    self._flower.ready()
                except LegolmError as error:
                    self._note(f"error: {error}")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                finally:
                    self._lock.release()

    def _give(self, name: str, id: str, block: Path) -> None:
        """Have the block's files where the region's devices ask for them: under the name that the server has for it."""
        place = self._folder / "blocks" / name
        if self._given != id:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(block, place, copy_function=os.link)
        self._given = id
