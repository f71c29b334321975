"""Tables of a run's figures for other programs: CSV files and pandas' frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from legolm.errors import LegolmError
from legolm.system import atomic_write

if TYPE_CHECKING:
    import pandas

Cell = str | int | float | None
Row = dict[str, Cell]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row under the first row's names, all or nothing; what is None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys() if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def to_frame(rows: Sequence[Row]) -> pandas.DataFrame:
    """The rows as pandas has them; what is None is NaN. Raises `LegolmError` without pandas."""
    try:
        import pandas
    except ImportError:
        raise LegolmError("to_frame: needs pandas; run: pip install 'legolm[data]'") from None
    return pandas.DataFrame(rows)
