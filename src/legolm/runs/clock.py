"""What a run's work took, over all processes that had a part in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from legolm.errors import LegolmError
from legolm.runs.records import Record, dump_sealed, read_sealed
from legolm.system import atomic_write

EVERY_S = 1.0


class Times(Record):
    """`clock.json`: seconds of the whole run so far, and of each stage that no record has yet."""

    schema_number: Literal[2] = 2
    wall: float = 0.0
    stages: dict[str, float] = Field({})


class Clock:
    """Goes on where an earlier process on the same folder stopped, or was killed up to a second later.

    One stage is under way at a time. Without a file nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._known, self.broken = path, Times(), False
        if path is not None and path.exists():
            try:
                self._known = read_sealed(path, Times)
            except LegolmError:
                self.broken = True
        self._stage: tuple[str, float] | None = None
        self._began = self._written = time.perf_counter()

    @property
    def wall(self) -> float:
        """Seconds of the run."""
        return self._known.wall + time.perf_counter() - self._began

    def seconds(self, stage: str) -> float:
        """Of a stage that is under way, or that no record has."""
        before = self._known.stages.get(stage, 0.0)
        running = self._stage is not None and self._stage[0] == stage
        return before + (time.perf_counter() - self._stage[1] if running and self._stage else 0.0)

    @contextmanager
    def stage(self, name: str, recorded: bool = True) -> Iterator[None]:
        """Count to this stage, also what is interrupted; at its end a record has its seconds, or this keeps them."""
        self._stage = name, time.perf_counter()
        done = False
        try:
            yield
            done = recorded
        finally:
            seconds = {} if done else {name: self.seconds(name)}
            self._stage = None
            self.forget(name)
            self._known = self._known.model_copy(update={"stages": self._known.stages | seconds})
            self._write()

    def forget(self, *stages: str) -> None:
        """Count these from 0, where they are made again."""
        left = {name: seconds for name, seconds in self._known.stages.items() if name not in stages}
        self._known = self._known.model_copy(update={"stages": left})

    def stop(self) -> None:
        """Keep what was counted: this process ends."""
        self._write()

    def tick(self) -> None:
        """Keep what was counted, now and then: a process may be killed at any time."""
        if time.perf_counter() - self._written > EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written = time.perf_counter()
        if self._path is None:  # nobody goes on with it
            return
        running = {} if self._stage is None else {self._stage[0]: self.seconds(self._stage[0])}
        times = Times(wall=self.wall, stages=self._known.stages | running)
        atomic_write(self._path, dump_sealed(times))
