"""Progress on the terminal: a bar with the time to go for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows stages; where the output is no terminal, one line for each finished stage."""

    def __init__(self, console: Console | None = None, of: str = "") -> None:
        """`of`: whose stages these are, where there are several runs."""
        self._console = console or Console(stderr=True)
        self._of = f"{of}: " if of else ""
        self.tick: Callable[[], None] = lambda: None
        """Called after every step of every stage."""

    def say(self, text: str) -> None:
        """A figure as it comes."""
        self._console.print(self._of + text, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say a line beside the stages."""
        self._console.print(f"note: {self._of}{text}", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps; call what it yields with the steps done."""
        label = self._of + label
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(label, total=total)

            def advance(steps: int) -> None:
                bars.advance(task, steps)
                self.tick()

            yield advance
        if not self._console.is_terminal:
            self._console.print(f"done: {label}", highlight=False, markup=False, soft_wrap=True)
