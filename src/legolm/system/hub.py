"""Whether the Hugging Face hub can be asked, known in seconds: its clients retry for half a minute or more."""

from __future__ import annotations

import socket
import time
from functools import lru_cache
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE_S = 5.0
KNOWN_S = 60.0


def wants_offline() -> bool:
    """Whether the user said so (HF_HUB_OFFLINE=1)."""
    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """Whether the hub's host takes connections; an answer holds for `KNOWN_S` at most.

    Behind a proxy only the hub's own clients can tell, and may try.
    """
    address = urlsplit(constants.ENDPOINT)
    if {address.scheme, "all"} & getproxies().keys():
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    return _answers(address.hostname, port, int(time.monotonic() / KNOWN_S))


@lru_cache(1)
def _answers(host: str | None, port: int, _when: int) -> bool:
    answered: list[bool] = []

    def knock() -> None:
        try:
            # A host may have several addresses, the first of them dead.
            socket.create_connection((host, port), PATIENCE_S / 3).close()
        except OSError:
            return
        answered.append(True)

    # In a thread: names are resolved, and addresses tried, without a limit.
    thread = Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(answered)
