"""A process that ends with who started it, however that one ends."""

from __future__ import annotations

import os
import signal
import threading
import time

LOOK_S = 1.0


def end_with_parent() -> None:
    """Have this process ended as by SIGTERM when `LEGOLM_PARENT`, who started it, is gone."""
    parent = int(os.environ["LEGOLM_PARENT"])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
