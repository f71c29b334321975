"""Where a sequence begins: one answer for training, calibration, recovery, generation, perplexity and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from legolm.errors import LegolmError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text, by its post-processor or `add_bos_token`: BOS, several tokens, nothing."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
    places = range(len(whole) - len(plain) + 1)
    return list(whole[: next((place for place in places if whole[place : place + len(plain)] == plain), 0)])


def begun(ids: Sequence[int], first: Sequence[int]) -> list[int]:
    """The tokens behind `first` (what `begin` gave), which they may bring themselves: it is there once."""
    return list(ids) if list(ids[: len(first)]) == list(first) else [*first, *ids]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's own tokens. Raises `LegolmError` for one that the model has no embedding for."""
    # verbose=False: a text longer than the model's context is no mistake here.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    rows = getattr(tokenizer, "rows", None)  # which `load_tokenizer` knows
    if rows is not None and ids and max(ids) >= rows:
        raise _foreign(next(one for one in ids if one >= rows), tokenizer)
    return ids


def check_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise the error of `encode` where the text names a token without an embedding; it is not tokenized."""
    for id, token in tokenizer.added_tokens_decoder.items():
        if id >= getattr(tokenizer, "rows", id + 1) and token.content in text:
            raise _foreign(id, tokenizer)


def windows(ids: Sequence[int], length: int, first: Sequence[int], most: int | None = None) -> Tensor:
    """The first `most` windows (windows, length) int64 of a text's tokens, side by side; the rest of it is left out.

    Each begins with `first` (what `begin` gave), once. Raises `LegolmError` where that leaves no room for the text.
    """
    if len(first) >= length:
        raise LegolmError(
            f"a window of {length} tokens has no room beside the {len(first)} that the tokenizer begins with; give "
            "a greater length"
        )
    found: list[Sequence[int]] = []
    start = 0
    while (most is None or len(found) < most) and start < len(ids):
        window = begun(ids[start : start + length], first)[:length]
        if len(window) < length:
            break
        start += length if list(ids[start : start + len(first)]) == list(first) else length - len(first)
        found.append(window)
    return torch.tensor(found, dtype=torch.int64).view(len(found), length)


def _foreign(id: int, tokenizer: PreTrainedTokenizerBase) -> LegolmError:
    token = brief(str(tokenizer.convert_ids_to_tokens(id)))
    rows = getattr(tokenizer, "rows", 0)
    return LegolmError(
        f"model: {tokenizer.name_or_path}/tokenizer.json: token {token!r} has id {id}, and the model embeddings for "
        f"{rows} tokens only (vocab_size); save the model after `resize_token_embeddings`, or take the token out of "
        "the tokenizer or the data"
    )
