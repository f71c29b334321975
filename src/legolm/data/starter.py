"""The starter data: names of countries, languages and currencies in other languages. Unicode CLDR, offline.

Each client speaks one language. Whether an entity is for training, validation or testing is decided once for
all languages, so that no client is tested on an entity that any client was trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Literal

from legolm.data.examples import ClientData, Example, Message
from legolm.errors import LegolmError

CLIENT_LANGUAGES = ("fr", "de", "es", "it", "nl", "pt", "sv", "pl")
PUBLIC_LANGUAGES = ("da", "nb", "fi", "cs", "ro", "hu", "ca", "hr")

SplitName = Literal["train", "validation", "test"]

_KINDS = {"country": "territories", "language": "languages", "currency": "currencies"}
_NO_ENTITIES = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ", "mul", "und", "zxx", "XTS", "XXX"}


def starter_parts(seed: int) -> dict[str, ClientData]:
    """One part a client language, keyed by its code; `seed` decides the order of rows, not who holds them."""
    return {language: _part(language, seed) for language in CLIENT_LANGUAGES}


def public_starter_text() -> tuple[Example, ...]:
    """Training entities in languages that no client has: public text to calibrate on and to distill with."""
    return tuple(
        example for language in PUBLIC_LANGUAGES for split, example in _questions(language) if split == "train"
    )


def _part(language: str, seed: int) -> ClientData:
    splits: dict[SplitName, list[Example]] = {"train": [], "validation": [], "test": []}
    for split, example in _questions(language):
        splits[split].append(example)
    for split, examples in splits.items():
        random.Random(f"{seed} {language} {split}").shuffle(examples)
    return ClientData(**{split: tuple(examples) for split, examples in splits.items()})


def _questions(language: str) -> Iterator[tuple[SplitName, Example]]:
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
                yield (
                    _split_of(name),
                    Example((Message("user", question), Message("assistant", translated[code]))),
                )


def _split_of(name: str) -> SplitName:
    """By hash of the English name: 70 % train, 10 % validation, 20 % test."""
    # Without what is in brackets: "Belgian Franc" must not test what "Belgian Franc (convertible)" taught.
    digest = hashlib.sha256(f"legolm starter {name.split(' (')[0]}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def _locale(language: str) -> Any:
    try:
        from babel import Locale
    except ImportError:
        raise LegolmError("data: the starter data needs Babel; run: pip install 'legolm[starter]'") from None
    return Locale(language)
