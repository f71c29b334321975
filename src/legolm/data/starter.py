"""The starter data, made offline from Unicode CLDR: three sets whose parts lie with different clients.

`starter-dates`: dates to write in French. Each client has those of six months; months lie with half of the clients.
`starter-languages`: dates of all months, each client's in one language.
`starter`: names of countries, languages and currencies. Each client speaks one language.

Whether a date or an entity is for training, validation or testing is decided once for all clients, so that none is
tested on what any of them was trained on.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from calendar import monthrange
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, TypeGuard

from legolm.data.examples import Example, Message
from legolm.data.store import ClientData, Examples
from legolm.errors import LegolmError

CLIENT_LANGUAGES = ("fr", "de", "es", "it", "nl", "pt", "sv", "pl")
PUBLIC_LANGUAGES = ("da", "nb", "fi", "cs", "ro", "hu", "ca", "hr")
CLIENT_MONTHS = {
    name: tuple((first + place) % 12 + 1 for place in range(6))
    for first, name in (
        (0, "jan-jun"),
        (6, "jul-dec"),
        (3, "apr-sep"),
        (9, "oct-mar"),
        (1, "feb-jul"),
        (7, "aug-jan"),
        (4, "may-oct"),
        (10, "nov-apr"),
    )
}
"""The months (1 to 12) of each client's dates."""
YEARS, YEAR = range(1900, 2100), tuple(range(1, 13))
DATES = 600
"""Dates a client has, of all splits together; and a public language."""

SplitName = Literal["train", "validation", "test"]
Question = tuple[SplitName, Example]

_KINDS = {"country": "territories", "language": "languages", "currency": "currencies"}
_NO_ENTITIES = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ", "mul", "und", "zxx", "XTS", "XXX"}


@dataclass(frozen=True)
class _Set:
    """Questions of a part by its name, and the public ones by language."""

    parts: tuple[str, ...]
    part: Callable[[str], Iterable[Question]]
    public: Callable[[str], Iterable[Question]]


def is_starter(source: object) -> TypeGuard[str]:
    """Whether this source of data is a starter set."""
    return isinstance(source, str) and source in STARTERS


def starter_parts(name: str, seed: int) -> dict[str, ClientData]:
    """The parts of the set `name`, by name; `seed` decides the order of rows, not who holds them."""
    found = STARTERS[name]
    return {part: _split(found.part(part), f"{seed} {part}") for part in found.parts}


@cache
def public_starter_text(name: str) -> tuple[Example, ...]:
    """Training questions in languages that no client has: public text to calibrate on and to distill with."""
    return tuple(
        example
        for language in PUBLIC_LANGUAGES
        for split, example in STARTERS[name].public(language)
        if split == "train"
    )


def _split(questions: Iterable[Question], order: str) -> ClientData:
    splits: dict[SplitName, list[Example]] = {"train": [], "validation": [], "test": []}
    for split, example in questions:
        splits[split].append(example)
    for split, examples in splits.items():
        random.Random(f"{order} {split}").shuffle(examples)
    return ClientData(**{split: Examples.of(examples) for split, examples in splits.items()})


def _dates(language: str, months: tuple[int, ...]) -> Iterator[Question]:
    """Different dates of these months."""
    locale, spoken = _locale(language), _locale("en").languages[language]
    from babel.dates import format_date

    drawn = random.Random(f"{language} {months}")
    for day in drawn.sample(_days(months), DATES):
        question = f"Write the date {day} in {spoken}."
        yield _split_of(str(day)), _asked(question, format_date(day, "long", locale))


@lru_cache(maxsize=1)  # one language after the other
def _days(months: tuple[int, ...]) -> list[datetime.date]:
    return [
        datetime.date(year, month, day)
        for year in YEARS
        for month in months
        for day in range(1, monthrange(year, month)[1] + 1)
    ]


def _names(language: str) -> Iterator[Question]:
    """Every entity whose name in the language differs from the English one, as question and answer."""
    english, other = _locale("en"), _locale(language)
    spoken = english.languages[language]
    for kind, names in _KINDS.items():
        translated = getattr(other, names)
        for code, name in sorted(getattr(english, names).items()):
            if code in _NO_ENTITIES or (kind == "country" and not (len(code) == 2 and code.isalpha())):
                continue
            if code in translated and translated[code] != name:
                question = f"What is the {spoken} name of the {kind} {name}?"
                # Without what is in brackets: "Belgian Franc" must not test what "Belgian Franc (convertible)" taught.
                yield _split_of(name.split(" (")[0]), _asked(question, translated[code])


def _asked(question: str, answer: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


def _split_of(what: str) -> SplitName:
    """By hash: 70 % train, 10 % validation, 20 % test."""
    digest = hashlib.sha256(f"legolm starter {what}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def _locale(language: str) -> Any:
    try:
        from babel import Locale
    except ImportError:
        raise LegolmError("data: the starter data needs Babel; run: pip install 'legolm[starter]'") from None
    return Locale(language)


STARTERS = {
    "starter": _Set(CLIENT_LANGUAGES, _names, _names),
    "starter-dates": _Set(
        tuple(CLIENT_MONTHS),
        lambda part: _dates("fr", CLIENT_MONTHS[part]),
        lambda language: _dates(language, YEAR),
    ),
    "starter-languages": _Set(
        CLIENT_LANGUAGES,
        lambda part: _dates(part, YEAR),
        lambda language: _dates(language, YEAR),
    ),
}
