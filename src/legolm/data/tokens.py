"""Tokens of many examples, kept flat: ten million of them are 20 MB, not objects."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import WeakKeyDictionary

import numpy as np

from legolm.data.examples import Example
from legolm.data.render import Tokens, render_each
from legolm.data.sequence import begin
from legolm.data.store import Examples
from legolm.data.template import prompt_look
from legolm.errors import LegolmError, PublicError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = 1 << 40
"""More tokens than a text has."""
AT_ONCE = 128
"""Examples rendered at once."""
KEPT_TOKENS = 1 << 26
"""In memory, of examples that may be asked for again: at most 256 MB, half of it for most vocabularies."""
Turns = Literal["last", "all"]


class TokenRows(Sequence[Tokens]):
    """The ids of all examples, two bytes each while none needs more, else four; of each where they end, where its
    answer begins in them, and whether it was cut, or its chat template changes it.
    """

    def __init__(self) -> None:
        self._ids, self._ends, self._answers = array("H"), array("q"), array("q")
        self._truncated, self._rewritten, self._left_out = bytearray(), bytearray(), bytearray()
        self._unopened = bytearray()

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
        self._left_out.append(tokens.left_out)
        self._unopened.append(tokens.unopened)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._ids)

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """One after the other; of a single one, itself."""
        if len(parts) == 1:
            return parts[0]
        found, kind = cls(), "I" if any(part._ids.typecode == "I" for part in parts) else "H"
        found._ids = array(kind)
        for part in parts:
            ends = np.array(part._ends, dtype=np.int64) + len(found._ids)
            found._ends.frombytes(ends.tobytes())
            found._ids.extend(part._ids if part._ids.typecode == kind else array(kind, part._ids))
            found._answers.extend(part._answers)
            found._truncated.extend(part._truncated)
            found._rewritten.extend(part._rewritten)
            found._left_out.extend(part._left_out)
            found._unopened.extend(part._unopened)
        return found

    @property
    def first_truncated(self) -> int | None:
        """The place of the first example that was cut; None where none was."""
        place = self._truncated.find(1)
        return None if place < 0 else place

    @property
    def truncated(self) -> tuple[int, int]:
        """Examples that were cut, and those that kept but a token of the question: their answer was cut, too."""
        cut = np.frombuffer(self._truncated, dtype=bool)
        return int(cut.sum()), int((cut & (np.array(self._answers) <= 1)).sum()) if len(cut) else 0

    @property
    def rewritten(self) -> int:
        """Examples whose answer the chat template would change."""
        return sum(self._rewritten)

    @property
    def left_out(self) -> int:
        """Examples of which the chat template leaves something out beside the answer."""
        return sum(self._left_out)

    @property
    def unopened(self) -> int:
        """Examples whose answer does not begin as the chat template asks for it."""
        return sum(self._unopened)

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
        flags = (self._truncated, self._rewritten, self._left_out, self._unopened)
        return Tokens(ids, self._answers[place], *(bool(flag[place]) for flag in flags))


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    turns: Turns = "last",
) -> TokenRows:
    """At most `max_length` tokens of each example; a text is cut into as many examples as it takes.

    With `turns` all, each of the assistant's turns is an example of its own, with what stands before it as the prompt:
    as the template writes it when that turn is asked for.
    """
    found, first = TokenRows(), begin(tokenizer)
    answers = (one for example in examples for one in (example.turns if turns == "all" else (example,)))
    for is_text, alike in groupby(answers, key=lambda one: one.is_text):
        for tokens in render_each(_batches(alike), tokenizer, WHOLE if is_text else max_length):
            for one in _pieces(tokens, first, max_length) if is_text else (tokens,):
                found.add(one)
    return found


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while some := list(islice(examples, AT_ONCE)):
        yield some


def tokens_of(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, turns: Turns = "last"
) -> TokenRows:
    """As `tokenize`, and once in a process: what the plan asked for, training has.

    Of more than `KEPT_TOKENS` those that were asked for longest ago are made again. They are known by the examples'
    content and by all that decides a text's tokens, whichever folder the tokenizer was read from.
    """
    key = examples.digest, _look(tokenizer), max_length, turns
    found = _kept.pop(key, None)
    if found is None:
        found = tokenize(examples, tokenizer, max_length, turns)
        _kept.count += found.tokens
    _kept[key] = found
    while len(_kept) > 1 and _kept.count > KEPT_TOKENS:
        _kept.count -= _kept.pop(next(iter(_kept))).tokens
    return found


def left_out(learned: Sequence[TokenRows]) -> list[str]:
    """A sentence where the chat template leaves something out beside the answer."""
    count = sum(rows.left_out for rows in learned)
    said = (
        f"The chat template leaves out or changes what {count} of {sum(map(len, learned))} conversations have beside "
        "the answer (a system message, a turn, a field of one); data.template may name one that writes it."
    )
    return [said] if count else []


def shortened(learned: Mapping[str, TokenRows], length: int) -> list[str]:
    """A sentence where examples to learn have more than `length` tokens, by client."""
    cut = {client: counts for client, rows in learned.items() if (counts := rows.truncated)[0]}
    if not cut:
        return []
    whole, answers = (sum(one[at] for one in cut.values()) for at in (0, 1))
    most = max(cut, key=lambda client: cut[client])
    return [
        f"data: {whole:,} of {sum(map(len, learned.values())):,} training examples are longer than {length:,} tokens "
        f"(train.max_length, or the model's context): they lose the start of their question, {answers:,} the end of "
        f"their answer too; of {most!r} it is {cut[most][0]:,} of {len(learned[most]):,}. "
        "train.long_examples: refuse stops there."
    ]


def check_whole(examples: TokenRows, length: int, split: str, client: str) -> None:
    """Raise `LegolmError` when one of them had more than `length` tokens."""
    place = examples.first_truncated
    if place is not None:
        raise PublicError(
            f"data: {split} example {place} of {client!r} is longer than {length} tokens; raise "
            "train.max_length as far as the model's context allows, or set train.long_examples=truncate"
        )


class _Kept(dict[tuple[Any, ...], TokenRows]):
    """The one used last is last. `count` are the tokens of all."""

    count = 0


_kept = _Kept()
_looks: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _look(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """All that decides what tokens a conversation has, and which are refused."""
    if tokenizer not in _looks:
        begin(tokenizer)  # by which it forgets the padding and truncation of whoever saved it
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # One in Python is like no other.
        content = f"{len(_looks)} {id(tokenizer)}" if backend is None else backend.to_str()
        _looks[tokenizer] = hashlib.sha256(content.encode()).hexdigest()
    special, rows = repr(tokenizer.special_tokens_map), getattr(tokenizer, "rows", None)
    return _looks[tokenizer], special, rows, repr(prompt_look(tokenizer))


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
