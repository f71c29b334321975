"""Whether the Hugging Face hub can be asked, known in seconds: its clients retry for half a minute or more."""

from __future__ import annotations

import socket
from functools import lru_cache
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE_S = 5.0


def wants_offline() -> bool:
    """Whether the user said so (HF_HUB_OFFLINE=1)."""
    return bool(constants.HF_HUB_OFFLINE)


@lru_cache
def hub_answers() -> bool:
    """Whether the hub's host takes connections; behind a proxy only the hub's own clients can tell, and may try."""
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return True
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection((address.hostname, address.port or 443), PATIENCE_S).close()
        except OSError:
            return
        answered.append(True)

    # In a thread: names are resolved, and a host's other addresses tried, without a limit.
    thread = Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(answered)
