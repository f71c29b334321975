"""Replies kept under the hash of their request: the same bytes get the same reply, and no work is done twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

from legolm.system import atomic_write, read_bounded

MOST_BYTES = 2 << 30
HASH_BYTES = 32


class Kept:
    """In `folder`, a file a request; of more than `most` replies the oldest go."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self._folder, self._most = folder, most

    def get(self, request: bytes) -> bytes | None:
        """What was answered; None where nothing was, or what is there is not what was written."""
        try:
            content = read_bounded(self._path(request), MOST_BYTES + HASH_BYTES)
        except OSError:
            return None
        known, reply = content[:HASH_BYTES], content[HASH_BYTES:]
        return reply if hashlib.sha256(reply).digest() == known else None

    def put(self, request: bytes, reply: bytes) -> None:
        """Raises `LegolmError` when the disk is full."""
        atomic_write(self._path(request), hashlib.sha256(reply).digest() + reply)
        if self._most is None:
            return
        # Not by time alone: after a clock was set back this would be the oldest.
        others = [one for one in self._folder.iterdir() if one.name[0] != "." and one != self._path(request)]
        others.sort(key=lambda one: one.stat().st_mtime_ns)
        for old in others[: max(0, len(others) + 1 - self._most)]:
            old.unlink(missing_ok=True)

    def _path(self, request: bytes) -> Path:
        return self._folder / hashlib.sha256(request).hexdigest()
