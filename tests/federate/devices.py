"""Registered devices of a federation on this machine, each a process of `legolm client`, behind a tap."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tap import Tap

from legolm.system import free_port
from legolm.trust import CA, add_device, make_authority, make_key, make_server, write_roster

LEGOLM = (sys.executable, "-m", "legolm.cli")
Found = TypeVar("Found")


def until(what: Callable[[], Found], patience_s: float, look_s: float = 0.3) -> Found:
    """What it gives, as soon as that is something. Raises `AssertionError` where it is nothing for so long."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(look_s)
    raise AssertionError("it did not come about")


class Devices:
    """Devices of these names with their CA; `command` starts one instead of `legolm`, in this environment.

    With `sums` they are for secure sums only.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        command: Callable[[str], Sequence[str]] = lambda name: LEGOLM,
        environment: Callable[[str], Mapping[str, str]] = lambda name: {},
        sums: bool = True,
    ) -> None:
        self.folder, self.names, self.home, self.port = folder, names, folder / "federation", free_port()
        self._command, self._environment, self._sums = command, environment, sums
        make_authority(self.home)
        make_server(self.home, ["127.0.0.1"])
        for name in names:
            self.make(name)
        write_roster(self.home, folder / "roster.json")
        self.tap = Tap(self.home, self.port)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def device(self, name: str) -> Path:
        """Its own folder."""
        return self.folder / "devices" / name

    def make(self, name: str, register: bool = True, days: float | None = None) -> Path:
        """A device's folder with its key."""
        device = self.device(name)
        public = make_key(device)
        (device / CA).write_bytes((self.home / CA).read_bytes())
        if register:
            add_device(self.home, name, public, days)
        return device

    def start(self, *names: str) -> None:
        """Their processes; what they say is in their logs."""
        for name in names:
            command = [*self._command(name), "client", "--server", f"127.0.0.1:{self.tap.port}", "--device", "cpu"]
            command += ["--home", str(self.device(name)), "--data", f"{self.folder}/data/{name}.jsonl"]
            command += ["--roster", str(self.folder / "roster.json")] if self._sums else []
            with (self.folder / f"{name}.log").open("ab") as log:
                environment = {**os.environ, **self._environment(name)}
                self._running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def pid(self, name: str) -> int:
        """Of its process."""
        return self._running[name].pid

    def alive(self, name: str) -> bool:
        """Whether it runs."""
        return name in self._running and self._running[name].poll() is None

    def kill(self, name: str) -> None:
        """By SIGKILL."""
        self._running[name].kill()
        self._running[name].wait()

    def log(self, name: str) -> str:
        """What it said."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def stop(self, patience_s: float) -> None:
        """End all, and the tap."""
        for one in self._running.values():
            one.terminate()
        for one in self._running.values():
            one.wait(patience_s)
        self.tap.close()
