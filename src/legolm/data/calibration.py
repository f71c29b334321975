"""Text that pruning and recovery see, as windows of tokens: public text, or a task's or user's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from legolm.config import CalibrationConfig, Fields
from legolm.data.examples import Example
from legolm.data.render import render
from legolm.data.sequence import begin, begun, encode, windows
from legolm.data.sources import DATA_SUFFIXES, paths_of, read_rows, read_text, to_example
from legolm.data.starter import is_starter, public_starter_text
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_tokens(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, seed: int, fewer: bool = False
) -> Tensor:
    """Windows of the text that do not overlap, drawn by `seed`: (samples, length) int64; or, if `fewer`, as are there.

    Each begins as the tokenizer begins a text.
    Conversations are rendered with the chat template and packed together; a starter set alternates between
    some and the prose of Python's help topics. Raises `LegolmError` if the text is missing or too short.
    """
    if is_starter(config.text) or config.text == "pydoc":
        streams = [encode("\n".join(topics.values()), tokenizer)]
        if is_starter(config.text):
            streams.insert(0, _conversations(public_starter_text(config.text), config, tokenizer, seed))
    elif Path(config.text).suffix in DATA_SUFFIXES:
        rows = read_rows(config.text, "calibration.text")
        streams = [_conversations([to_example(row, config.fields) for row in rows], config, tokenizer, seed)]
    else:
        streams = [encode(_read_prose(config.text, "calibration.text"), tokenizer)]
    pools = [_shuffled(windows(stream, config.length, begin(tokenizer)), seed) for stream in streams]
    available = min(len(pool) * len(pools) + place for place, pool in enumerate(pools))
    if available < (1 if fewer else config.samples):
        raise LegolmError(
            f"calibration.samples = {config.samples}: {config.text!r} has {available} samples of "
            f"{config.length} tokens; ask for fewer or shorter ones, or give a longer text"
        )
    count = min(available, config.samples)
    return torch.stack([pools[sample % len(pools)][sample // len(pools)] for sample in range(count)])


def check_text(text: str, fields: Fields, field: str) -> None:
    """Raise `LegolmError` when `calibration_tokens` would not find the text, or no conversations in its rows.

    `field` names it.
    """
    if Path(text).suffix in DATA_SUFFIXES:
        for row in read_rows(text, field):
            to_example(row, fields)
    elif not is_starter(text) and text != "pydoc":
        _read_prose(text, field)


def _read_prose(text: str, field: str) -> str:
    """The file of this name, or all that match the pattern, in order."""
    return "\n".join(read_text(path, field) for path in paths_of(text, field))


def _shuffled(found: Tensor, seed: int) -> Tensor:
    return found[random.Random(f"{seed} windows").sample(range(len(found)), len(found))]


def _conversations(
    examples: Sequence[Example], config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[int]:
    """Shuffled, so that a window mixes kinds, and no more than `config` needs: rendering takes time."""
    shuffled = random.Random(f"{seed} conversations").sample(examples, len(examples))
    rendered = (render(example, tokenizer, config.length).ids for example in shuffled)
    return list(islice(chain.from_iterable(rendered), config.samples * config.length))


def prose(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` tokens of Python's help topics, begun as the tokenizer begins a text.

    From the start again where a context is longer.
    """
    text = "\n".join(topics.values())
    ids = encode(text[: 16 * count], tokenizer)  # no tokenizer makes fewer tokens of it
    return begun((ids * (count // len(ids) + 1)), begin(tokenizer))[:count]
