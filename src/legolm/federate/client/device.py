"""`legolm client`: a device of its own. Its resident process, and Flower's node, which is started again when it ends.

A node that ends, is refused or is alive without being heard at the server is nothing that a user need know of: what
was asked is asked again, and what was answered is kept.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from legolm.errors import LegolmError
from legolm.federate.bridge import listen
from legolm.federate.client.answering import Answering
from legolm.federate.client.door import Door
from legolm.federate.client.fetch import Piece, UnreachableError
from legolm.system import Helpers, atomic_write, free_port, locked, sockets_place
from legolm.trust import CA, KEY, make_key

LOOK_S, LISTEN_S = 1.0, 15.0
"""From one look at the node to the next, and at what the server heard of it."""
SILENT_S = 75.0
"""A node beats every 25 s: after three times it is offline, whatever its process does."""
AGAIN_S, MOST_AGAIN_S = 2.0, 30.0
"""Before the node is started again: twice as long each time that it ends early."""
NODE = "node"


def stay(
    server: str,
    ca: Path | None,
    home: Path,
    note: Callable[[str], None],
    answering: Callable[[str | None, Piece], Answering],
) -> None:
    """Be the device in the folder `home` of the federation at `server`, until interrupted.

    Raises `LegolmError` when it is kept out, and for what cannot work: before a node is started where that is known.
    """
    with locked(home):
        ca = _authority(home, ca)
        if not (home / KEY).exists():
            public = make_key(home)
            raise LegolmError(
                f"{home}: a key was made; give {public} to the server's owner (legolm devices add), then run this again"
            )
        # Flower's node has a longer one: of a forkserver.
        place = sockets_place(len("/pymp-12345678/listener-12345678"))
        with Door(server, ca, home / KEY) as door, TemporaryDirectory(prefix="legolm-", dir=place) as sockets:
            said = _when_there(door, note)
            name = said.get("name")
            note(f"{server}: this device is {name!r}" if name else f"{server}: a SuperLink without legolm's guard")
            path = f"{sockets}/resident"
            with listen(path) as listener:
                threading.Thread(target=answering(name, door.piece).serve, args=(listener,), daemon=True).start()
                with Helpers(home / "flower", _environment(home) | {"TMPDIR": place}) as helpers:
                    _supervise(helpers, _command(server, ca, home / KEY, path), door, bool(said), note)


def _supervise(helpers: Helpers, command: list[str], door: Door, guarded: bool, note: Callable[[str], None]) -> None:
    """Keep the node running and heard. Raises `LegolmError` when the server keeps the device out."""
    wait = AGAIN_S
    while True:
        began = time.monotonic()
        helpers.start(NODE, command)
        while helpers.alive(NODE):
            time.sleep(LOOK_S)
            if guarded and (time.monotonic() - began) % LISTEN_S < LOOK_S and _is_silent(door, began):
                note("Flower's node runs, but the server does not hear it; it is started again")
                helpers.stop(NODE)
        wait = AGAIN_S if time.monotonic() - began > MOST_AGAIN_S else min(2 * wait, MOST_AGAIN_S)
        note(f"Flower's node ended; it is started again in {wait:g} s ({helpers.log(NODE)} says more)")
        time.sleep(wait)
        _when_there(door, note)


def _is_silent(door: Door, began: float) -> bool:
    """Whether the server heard nothing of a node that had the time to be heard."""
    try:
        silent = door.hello().get("silent_s")
    except UnreachableError:
        return False
    running = time.monotonic() - began
    return running > SILENT_S and (silent is None or silent > SILENT_S)


def _when_there(door: Door, note: Callable[[str], None]) -> dict[str, Any]:
    """What the server says, as soon as it answers, to a device without a node.

    Raises `LegolmError` when it keeps the device out.
    """
    said = ""
    while True:
        try:
            return door.hello(anew=True)
        except UnreachableError as error:
            if str(error) != said:
                note(f"{error}; trying again")
            said = str(error)
            time.sleep(AGAIN_S)


def _authority(home: Path, given: Path | None) -> Path:
    """The CA's certificate, kept in the home. Raises `LegolmError` when it is missing, or another federation's."""
    path = home / CA
    if given is not None:
        try:
            content = given.read_bytes()
        except OSError as error:
            raise LegolmError(f"--ca {given}: cannot be read ({error.strerror}); give the server's ca.pem") from None
        if path.exists() and _hash(path.read_bytes()) != _hash(content):
            raise LegolmError(f"--home {home}: is of another federation, its {CA} differs; give another --home")
        if not path.exists():
            atomic_write(path, content)
    if not path.is_file():
        raise LegolmError(f"--home {home}: no {CA}; get it from the server's owner, and give it as --ca {CA}")
    return path


def _hash(content: bytes) -> str:
    return hashlib.sha256(content.replace(b"\r\n", b"\n").strip()).hexdigest()


def _environment(home: Path) -> dict[str, str]:
    return {
        "FLWR_HOME": str((home / "flower").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def _command(server: str, ca: Path, key: Path, socket: str) -> list[str]:
    options = {
        "--superlink": server,
        "--root-certificates": str(ca.resolve()),
        "--auth-supernode-private-key": str(key.resolve()),
        "--node-config": f'socket="{socket}"',
    }
    command = [sys.executable, "-m", "legolm.federate.bridge.node", f"127.0.0.1:{free_port()}"]
    return [*command, *(word for pair in options.items() for word in pair)]
