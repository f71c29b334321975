"""The one error of the package."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class LegolmError(Exception):
    """Bad input: one line that names the field, the value and the fix. The command exits with code 2."""


def nearest(word: str, known: Collection[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" did you mean `{close[0]}`?" if close else f" known: {', '.join(known)}"
