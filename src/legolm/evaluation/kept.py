"""What an evaluation has so far, beside the file that it writes: one that was killed goes on there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legolm.evaluation.figure import figure_of, whole_json
from legolm.evaluation.harness import TaskFigures
from legolm.system import LOCK, atomic_write, file_hash, locked, read_bounded


@dataclass(frozen=True)
class Kept:
    """Parts of one model's evaluation in a folder, or nowhere. They follow from `whose` and what is asked."""

    folder: Path | None = None
    whose: str = ""

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        """The JSON value that `make` made for `what`, in this process or one before."""
        if self.folder is None:
            return make()
        name = hashlib.sha256(f"{self.whose} {what}".encode()).hexdigest()
        path = self.folder / f"{name}.json"
        found = _read(path)
        if found is None:
            found = [make()]
            content = json.dumps(found)
            atomic_write(path, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
        return found[0]

    def figures(self, what: str, make: Callable[[], TaskFigures]) -> TaskFigures:
        """The figures, likewise."""
        if self.folder is None:
            return make()
        found = self.once(what, lambda: as_json(make()))
        return from_json(found)


def as_json(figures: TaskFigures) -> Any:
    """With all that each figure holds: floats are written so that they are read as they were."""
    return {task: {name: whole_json(one) for name, one in metrics.items()} for task, metrics in figures.items()}


def from_json(found: Any) -> TaskFigures:
    """The figures that `as_json` wrote."""
    return {task: {name: figure_of(one) for name, one in metrics.items()} for task, metrics in found.items()}


def digest_of(*folders: Path | None) -> str:
    """SHA-256 over names and contents of all files below the folders."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder else ():
            if file.is_file():
                found.update(f"{file.relative_to(str(folder))} {file_hash(file)}\n".encode())
        found.update(b"\n")
    return found.hexdigest()


@contextmanager
def kept_beside(out: Path | None) -> Iterator[Path | None]:
    """A folder beside `out` for parts of what it will hold, for this process alone; gone when the block ends well.

    Raises `LegolmError` when another process works there.
    """
    if out is None:
        yield None
        return
    folder = out.with_name(f"{out.name}.parts")
    with locked(folder):
        try:
            yield folder
        except BaseException:
            if {file.name for file in folder.iterdir()} <= {LOCK}:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _read(path: Path) -> list[Any] | None:
    """None where the file is not there, or is not what was written."""
    try:
        hashed, _, content = read_bounded(path).decode().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if hashlib.sha256(content.encode()).hexdigest() != hashed:
        return None
    found: list[Any] = json.loads(content)
    return found
