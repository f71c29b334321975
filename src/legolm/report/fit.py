"""Tables and texts for a terminal: nothing cut off but long answers, no empty column, never wider than it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from legolm.errors import printable

GAP = 2
"""Between columns."""
LEAST_TEXT, MOST_KEY = 20, 24
"""Columns of words are folded down to the one, those that name the rows to the other at most."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1, title: str = "") -> None:
    """Print a table that fits the terminal (80 columns where there is none); a leading `>` aligns a column right.

    Columns without a cell are left out. Heads and words are folded; what still does not fit goes below, after the
    first `keys` columns once more, for they say whose the rows are.
    """
    console = Console()
    if title:
        console.print(title, highlight=False, markup=False)
    for place, table in enumerate(fitted(columns, rows, console.width, keys)):
        if place:
            console.print()
        console.print(table)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are: what they quote of others may hold control codes, or what Rich takes for markup."""
    for line in lines:
        Console().print(printable(line), highlight=False, markup=False, soft_wrap=True)


def fitted(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, keys: int = 1) -> list[Table]:
    """The tables of `print_table`, none wider than `width`."""
    kept = [i for i in range(len(columns)) if i < keys or any(row[i] for row in rows)]
    heads = {i: columns[i].removeprefix(">") for i in kept}
    wide = {i: max(map(cell_len, (heads[i], *(row[i] for row in rows)))) for i in kept}
    if sum(wide.values()) + GAP * (len(kept) - 1) > width:  # a head may be folded between its words, a number nowhere
        wide = {i: max(map(cell_len, (*heads[i].split(), *(row[i] for row in rows)))) for i in kept}
    first, rest = kept[:keys], kept[keys:]
    for i in first:
        wide[i] = min(wide[i], MOST_KEY)
    parts = [list(first)]
    for i in rest:
        room = width - sum(wide[j] + GAP for j in parts[-1])
        words = not columns[i].startswith(">")
        if wide[i] > room and not (words and room >= LEAST_TEXT) and len(parts[-1]) > keys:
            parts.append(list(first))
            room = width - sum(wide[j] + GAP for j in first)
        wide[i] = min(wide[i], max(room, 1))
        parts[-1].append(i)
    return [_table(part, columns, rows, wide) for part in parts]


def shortened(text: str, width: int) -> str:
    """The text in one line without control codes, cut with an ellipsis where it is wider than `width` cells."""
    line = " ".join(printable(text).split())
    return line if cell_len(line) <= width else set_cell_size(line, max(width - 1, 0)).rstrip() + "…"


def _table(part: Sequence[int], columns: Sequence[str], rows: Sequence[Sequence[str]], wide: dict[int, int]) -> Table:
    table = Table(box=None, pad_edge=False)
    for i in part:
        justify = "right" if columns[i].startswith(">") else "left"
        table.add_column(Text(columns[i].removeprefix(">")), justify=justify, width=wide[i], overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(row[i])) for i in part))
    return table
