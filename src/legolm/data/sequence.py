"""Where a sequence begins: one answer for training, calibration, recovery, generation, perplexity and tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
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
    return encode_all((text,), tokenizer)[0]


def encode_all(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """As `encode`, of several at once, which is faster."""
    if not texts:  # which transformers does not take
        return []
    found = _ids(list(texts), tokenizer)
    rows = getattr(tokenizer, "rows", math.inf)  # which `load_tokenizer` knows
    for ids in found:
        if ids and max(ids) >= rows:
            raise _foreign(next(one for one in ids if one >= rows), tokenizer)
    return found


def border_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The last token of the text at which any text falls apart: its tokens are those of what stands before this token
    and those of what begins with it. None where no token is known to be one.

    It is one that tokenizers looks for before it does anything else, and in the whole text, which no neighbour widens
    (lstrip, a word of its own) and no other such token overlaps.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    added = tokenizer.added_tokens_decoder
    ids = encode(text, tokenizer)
    for token in (added[id] for id in reversed(ids) if id in added):
        sign = token.content
        if token.special and not (token.normalized or token.lstrip or token.single_word):
            ends = (other.content[start:] for other in added.values() for start in range(1, len(other.content)))
            return None if any(end.startswith(sign) or sign.startswith(end) for end in ends) else sign
    return None


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # As transformers does it, but without each token's place in its text, which takes a quarter of the time.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
    # verbose=False: a text longer than the model's context is no mistake here.
    given: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    found: list[list[int]] = tokenizer(texts, **given)["input_ids"]
    return found


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no text makes: those that the tokenizer has a name for, and all that it lists as special."""
    listed = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *listed}


def check_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise the error of `encode` where a text names a token without an embedding; none is tokenized."""
    rows = getattr(tokenizer, "rows", math.inf)
    beyond = [(id, token.content) for id, token in tokenizer.added_tokens_decoder.items() if id >= rows]
    for text in texts if beyond else ():
        for id, token in beyond:
            if token in text:
                raise _foreign(id, tokenizer, where)


def windows(ids: Sequence[int] | np.ndarray, length: int, first: Sequence[int], most: int | None = None) -> Tensor:
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
        window = begun([int(id) for id in ids[start : start + length]], first)[:length]
        if len(window) < length:
            break
        start += length if list(ids[start : start + len(first)]) == list(first) else length - len(first)
        found.append(window)
    return torch.tensor(found, dtype=torch.int64).view(len(found), length)


def _foreign(id: int, tokenizer: PreTrainedTokenizerBase, where: str = "") -> LegolmError:
    rows = getattr(tokenizer, "rows", 0)
    return LegolmError(
        f"{where}{': ' if where else ''}token {brief(repr(tokenizer.convert_ids_to_tokens(id)))} has id {id} in "
        f"{tokenizer.name_or_path}/tokenizer.json, and the model embeddings for {rows} tokens (vocab_size); save the "
        "model after `resize_token_embeddings`, or take the token out of the data or the tokenizer"
    )
