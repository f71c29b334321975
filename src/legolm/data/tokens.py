"""Tokens of many examples, kept flat: ten million of them are 20 MB, not objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from legolm.data.examples import Example
from legolm.data.render import Tokens, render_many
from legolm.data.sequence import begin
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = 1 << 40
"""More tokens than a text has."""
AT_ONCE = 64
"""Examples rendered at once."""


class TokenRows(Sequence[Tokens]):
    """The ids of all examples, two bytes each while none needs more, else four; of each where they end, where its
    answer begins in them, and whether it was cut, or its chat template would change it.
    """

    def __init__(self) -> None:
        self._ids, self._ends, self._answers = array("H"), array("q"), array("q")
        self._truncated, self._rewritten = bytearray(), bytearray()

    def add(self, tokens: Tokens) -> None:
        """Put it last."""
        try:
            self._ids.extend(tokens.ids)
        except OverflowError:
            self._ids = array("I", self._ids[: self._ends[-1] if self._ends else 0])
            self._ids.extend(tokens.ids)
        self._ends.append(len(self._ids))
        self._answers.append(tokens.answer)
        self._truncated.append(tokens.truncated)
        self._rewritten.append(tokens.rewritten)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._ids)

    @property
    def rewritten(self) -> int:
        """Examples whose answer the chat template would change."""
        return sum(self._rewritten)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (n,) int64."""
        return np.diff(np.array(self._ends, dtype=np.int64), prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self._get(place) for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._get(index % len(self))

    def __iter__(self) -> Iterator[Tokens]:
        return map(self._get, range(len(self)))

    def _get(self, place: int) -> Tokens:
        start = self._ends[place - 1] if place else 0
        ids = tuple(self._ids[start : self._ends[place]])
        flags = bool(self._truncated[place]), bool(self._rewritten[place])
        return Tokens(ids, self._answers[place], *flags)


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    turns: Literal["last", "all"] = "last",
) -> TokenRows:
    """At most `max_length` tokens of each example; a text is cut into as many examples as it takes.

    With `turns` all, each of the assistant's turns is an example of its own, with what stands before it as the prompt:
    as the template writes it when that turn is asked for.
    """
    found, first = TokenRows(), begin(tokenizer)
    answers = (one for example in examples for one in (example.turns if turns == "all" else (example,)))
    for is_text, alike in groupby(answers, key=lambda one: one.raw and len(one.messages) == 1):
        while some := list(islice(alike, AT_ONCE)):
            for tokens in render_many(some, tokenizer, WHOLE if is_text else max_length):
                for one in _pieces(tokens, first, max_length) if is_text else (tokens,):
                    found.add(one)
    return found


def _pieces(whole: Tokens, first: Sequence[int], length: int) -> Iterator[Tokens]:
    """A text in sequences of at most `length` tokens, which begin as a text does: with `first`, or else with the last
    token of the one before.

    So every token of the text that something stands before is learned once.
    """
    shared = len(first) or 1
    if shared >= length:
        raise LegolmError(f"train.max_length {length}: the tokenizer begins each text with {shared} tokens; raise it")
    for start in range(shared, len(whole.ids), length - shared):
        before = first or whole.ids[start - 1 : start]
        yield Tokens((*before, *whole.ids[start : start + length - shared]), shared)
