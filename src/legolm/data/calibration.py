"""Text that pruning and recovery see, as windows of tokens: public text, or a task's or user's own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from legolm.config import RowsConfig, TextConfig
from legolm.data.examples import Example
from legolm.data.layouts import read_examples
from legolm.data.prose import PIECE, check_prose, read_prose, text_tokens
from legolm.data.render import render
from legolm.data.sequence import begin, begun, encode, windows
from legolm.data.sources import is_rows, parts_of, paths_of, state_of
from legolm.data.starter import is_starter, public_starter_text
from legolm.data.store import Examples
from legolm.data.tokens import WHOLE
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLENTY = 1 << 16
"""Tokens that the texts which come with legolm have in any case."""
LONG = 64
"""Bytes of a text that are read for each token wanted: ten times as many as there are."""


def calibration_tokens(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int, fewer: bool = False, field: str = "calibration"
) -> Tensor:
    """Windows of the text that do not overlap, drawn by `seed`: (samples, length) int64; or, if `fewer`, as are there.

    `field` is the section's name.
    Each begins as the tokenizer begins a text.
    Conversations are rendered with the chat template and packed together; a starter set alternates between
    some and the prose of Python's help topics. Raises `LegolmError` if the text is missing or too short.
    """
    needed = config.samples * config.length
    if is_bundled(config.text):
        streams = [text_tokens("\n".join(topics.values()), tokenizer)]
        if is_starter(config.text):
            streams.insert(0, _conversations(public_starter_text(config.text), config, tokenizer, seed))
    elif is_rows(config.text):
        rows = Examples.of(read_examples(config.text, config, f"{field}.text"))
        streams = [_conversations(rows, config, tokenizer, seed)]
    else:
        paths = paths_of(config.text, f"{field}.text")
        text = read_prose(paths, f"{field}.text", max(PIECE, LONG * needed), seed)
        streams = [text_tokens(text, tokenizer)]
    asked = f"{field}.text" if fewer else f"{field}.samples = {config.samples}"
    return _drawn(streams, config, tokenizer, seed, fewer, f"{asked}: {config.text!r}")


def check_samples(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int, field: str, fewer: bool = False
) -> None:
    """Raise `LegolmError` where `calibration_tokens` would. Once as long as its files are the same: each plan asks."""
    ours = is_bundled(config.text)
    if ours and config.samples * config.length <= PLENTY:
        return
    states = () if ours else tuple(state_of(part) for part in parts_of(config.text, f"{field}.text"))
    (_drawn_once if all(states) else _drawn_once.__wrapped__)(config, tokenizer, seed, field, fewer, states)


@lru_cache(maxsize=32)
def _drawn_once(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    field: str,
    fewer: bool,
    _states: tuple[str | None, ...],
) -> None:
    calibration_tokens(config, tokenizer, seed, fewer, field)


def own_tokens(
    examples: Sequence[Example], config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Tensor:
    """The same of a client's own conversations: as many windows as there are, up to `config.samples`.

    Raises `LegolmError` where there is none.
    """
    stream = _conversations(examples, config, tokenizer, seed)
    return _drawn([stream], config, tokenizer, seed, True, f"calibration.length = {config.length}: its own text")


def _drawn(
    streams: Sequence[Tensor],
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    fewer: bool,
    what: str,
) -> Tensor:
    """Windows of these streams in turn. Raises `LegolmError` for less than are wanted, or if `fewer` for none; `what`
    has the field and the text.
    """
    pools = [_shuffled(windows(stream.numpy(), config.length, begin(tokenizer)), seed) for stream in streams]
    available = min(len(pool) * len(pools) + place for place, pool in enumerate(pools))
    if available < (1 if fewer else config.samples):
        ask = "shorter ones (calibration.length)" if fewer else "fewer or shorter ones"
        raise LegolmError(
            f"{what} has {available} samples of {config.length} tokens; ask for {ask}, or give a longer text"
        )
    count = min(available, config.samples)
    return torch.stack([pools[sample % len(pools)][sample // len(pools)] for sample in range(count)])


def check_length(length: int, context: int, field: str) -> None:
    """Raise `LegolmError` for samples that are longer than what the model takes at once."""
    if length > context:
        raise LegolmError(
            f"{field}.length: {length} tokens are more than the model takes at once, {context}; ask for shorter samples"
        )


def is_bundled(text: str) -> bool:
    """Whether it is a starter set or Python's help topics, which come with the installation."""
    return is_starter(text) or text == "pydoc"


def check_text(text: str, rows: RowsConfig, field: str) -> list[str]:
    """What there is to say of its rows. Raises `LegolmError` when `calibration_tokens` would not find the text, or no
    conversations in its rows. `field` names it.
    """
    if is_rows(text):
        states = tuple(state_of(part) for part in parts_of(text, field))
        return [*(_said_of if all(states) else _said_of.__wrapped__)(text, rows, field, states)]
    if not is_bundled(text):
        for path in paths_of(text, field):
            check_prose(path, field)
    return []


@lru_cache(maxsize=16)
def _said_of(text: str, rows: RowsConfig, field: str, _states: tuple[str | None, ...]) -> tuple[str, ...]:
    """What there is to say of rows, read once as long as their files are the same: each plan of a study asks."""
    said: list[str] = []
    for _ in read_examples(text, rows, field, said):
        pass
    return tuple(said)


def _shuffled(found: Tensor, seed: int) -> Tensor:
    return found[random.Random(f"{seed} windows").sample(range(len(found)), len(found))]


def _conversations(
    examples: Sequence[Example], config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Tensor:
    """Shuffled, so that a window mixes kinds, and no more than `config` needs: rendering takes time.

    A conversation is whole. A text gives a sample's tokens, so that many are seen; the rest where all give too few.
    """
    order = random.Random(f"{seed} conversations").sample(range(len(examples)), len(examples))
    rests: list[Sequence[int]] = []

    def parts() -> Iterator[Sequence[int]]:
        for example in (examples[place] for place in order):
            ids = render(example, tokenizer, WHOLE).ids
            first = config.length if example.is_text else len(ids)
            rests.append(ids[first:])
            yield ids[:first]
        yield from rests

    found = islice(chain.from_iterable(parts()), config.samples * config.length)
    return torch.tensor(list(found), dtype=torch.int64)


def help_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` tokens of Python's help topics, begun as the tokenizer begins a text.

    From the start again where a context is longer.
    """
    text = "\n".join(topics.values())
    ids = encode(text[: 16 * count], tokenizer)  # no tokenizer makes fewer tokens of it
    return begun((ids * (count // len(ids) + 1)), begin(tokenizer))[:count]
