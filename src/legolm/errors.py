"""The one error of the package, and its kinds."""

from __future__ import annotations

import difflib
from collections.abc import Collection

MAX_LINE = 2000
"""Signs of an error: what it quotes may be as long as a file."""


class LegolmError(Exception):
    """Bad input: one line that names the field, the value and the fix. The command exits with code 2.

    What the text quotes of the input may hold anything: control codes become spaces, and of a text that is too long its
    begin and its end stay.
    """

    def __str__(self) -> str:
        line = printable(super().__str__())
        half = MAX_LINE // 2
        return line if len(line) <= MAX_LINE else f"{line[:half]} … {line[-half:]}"


class PublicError(LegolmError):
    """One whose text has nothing of a device's rows or disk: a device tells it to its server, and of others no more
    than that there was one."""


def printable(text: str) -> str:
    """The text with spaces for control codes and line ends."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


class MissingDataError(LegolmError):
    """Data that a config names and that are not there; who has the config adds how to get them (`data.fetch`)."""


class UnusableRoundError(LegolmError):
    """A round without updates or scores that anything can be made of: of other settings there may be."""


MAX_SAID = 300
"""Signs of another library's error in one of ours."""


def brief(error: BaseException | str) -> str:
    """What an error of another library says: one line, not long, without control codes, and never nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = printable(text[:MAX_SAID])
    return shown if len(text) <= MAX_SAID else f"{shown}…"


def nearest(word: str, known: Collection[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" did you mean `{close[0]}`?" if close else f" known: {', '.join(known)}"
