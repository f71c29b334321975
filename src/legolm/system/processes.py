"""Processes that work for this one: started, started again, and ended with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import psutil

from legolm.errors import LegolmError

MAX_LOG = 16 << 20
"""Bytes of a log after which a new one begins; the one before is kept."""
GRACE_S = 10.0


def end_with_parent() -> None:
    """Let this process of `multiprocessing` end when the one that started it does, even if that was killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _without_script() -> Iterator[None]:
    """Keep from a process that is spawned where the script lies that runs in this one."""
    main = sys.modules["__main__"]
    known: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(known)


class _Spawned(SpawnProcess):
    def start(self) -> None:
        with _without_script():
            super().start()


class Spawning(SpawnContext):
    """As `get_context("spawn")`, but its processes do not import the user's script, which would begin again in each
    of them where it has no `if __name__ == "__main__"`.
    """

    Process = _Spawned


class Helpers:
    """Child processes by name, with their logs in `folder`. They end with the block."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        scripts = sysconfig.get_path("scripts")
        path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
        self._env = {**os.environ, **env, "PATH": path, "LEGOLM_PARENT": str(os.getpid())}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a program, or start it again. Raises `LegolmError` when it is not there."""
        self.stop(name)
        path = self._folder / f"{name}.log"
        if path.exists() and path.stat().st_size > MAX_LOG:
            path.replace(path.with_suffix(".old.log"))
        try:
            with path.open("ab") as log:
                self._running[name] = subprocess.Popen(
                    command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise LegolmError(f"{command[0]}: cannot be started ({error}); is legolm installed whole?") from None

    def alive(self, name: str) -> bool:
        """Whether it was started and has not ended."""
        found = self._running.get(name)
        return found is not None and found.poll() is None

    def works(self, name: str) -> bool:
        """Whether it has a child process."""
        try:
            return self.alive(name) and bool(psutil.Process(self._running[name].pid).children())
        except psutil.Error:
            return False

    def ended(self, name: str) -> int | None:
        """The exit code of what was started and has ended."""
        found = self._running.get(name)
        return None if found is None else found.poll()

    def log(self, name: str) -> Path:
        """Its log."""
        return self._folder / f"{name}.log"

    def stop(self, *names: str) -> None:
        """End these, and all that they started; a process that does not end by itself is killed."""
        found = [self._running.pop(name) for name in names if name in self._running]
        with_children: list[psutil.Process] = []
        for one in found:
            with suppress(psutil.Error):
                process = psutil.Process(one.pid)
                with_children += [process, *process.children(recursive=True)]
        self._end(with_children)
        for one in found:
            one.wait()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop(*self._running)

    def _end(self, processes: Sequence[psutil.Process]) -> None:
        for one in processes:
            with suppress(psutil.Error):
                one.terminate()
        for one in psutil.wait_procs(processes, GRACE_S)[1]:
            with suppress(psutil.Error):
                one.kill()


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
