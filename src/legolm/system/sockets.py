"""Where Unix sockets lie: of a path a system takes about a hundred letters."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir

from legolm.errors import LegolmError

MOST = 103
"""Bytes of a socket's path on macOS; Linux takes four more."""


def sockets_place(below: int, *first: str | None) -> str:
    """A folder for temporary ones in which sockets' paths are `below` bytes longer than its own: the first that will do
    of these, `TMPDIR`, which batch systems and macOS make long, and `/tmp`.

    Raises `LegolmError` where none will.
    """
    for folder in (*first, gettempdir(), "/tmp"):
        if not folder or not os.access(folder, os.W_OK | os.X_OK):
            continue
        if len(os.fsencode(Path(folder).absolute())) + below <= MOST:
            return folder
    raise LegolmError(
        f"TMPDIR {gettempdir()}: is too long for the paths of sockets in it, and nothing can be written in /tmp; set "
        f"it to a folder of at most {MOST - below} letters"
    )
