"""`python dying.py FILE [legolm's arguments]`: legolm that is killed when it has trained for the first time in a round.

Once: FILE is there then.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from legolm.cli import main
from legolm.federate.client import runtime

died, train = Path(sys.argv[1]), runtime.train


def trained(task: Any) -> Any:
    """SIGKILL in the place of a reply."""
    found = train(task)
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return found


runtime.train = trained
sys.argv = ["legolm", *sys.argv[2:]]
main()
