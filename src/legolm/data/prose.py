"""Running text, of which only what is needed is read and tokenized, a piece at a time."""

from __future__ import annotations

import codecs
import random
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from legolm.data.files import NOT_UTF8, check_file
from legolm.data.sequence import encode
from legolm.errors import LegolmError
from legolm.system import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 20
"""Characters tokenized at once: the tokenizer needs a hundred bytes for each."""
SPANS = 16
"""Places that a long text is read at."""
_BORDER = re.compile(r"\n(?=\S)")


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Tensor:
    """The first `most` token ids (n,) int64 of a text. A piece ends where a line does, so that words stay whole."""
    found, at = array("i"), 0
    while at < len(text) and (most is None or len(found) < most):
        border = _BORDER.search(text, at + PIECE, at + 2 * PIECE)
        end = border.end() if border else at + PIECE if len(text) > at + 2 * PIECE else len(text)
        found.extend(encode(text[at:end], tokenizer))
        at = end
    return torch.from_numpy(np.array(found[:most], dtype=np.int64))


def read_text(path: Path, field: str, most: int | None = None) -> str:
    """The UTF-8 file, or its first `most` bytes. Raises `LegolmError` if it is missing, too large or not UTF-8."""
    check_file(path, field)
    with reading(f"{field}: {path}"), path.open("rb") as file:
        raw = file.read() if most is None else file.read(most)
    if raw.startswith(codecs.BOM_UTF8):
        raw = raw[len(codecs.BOM_UTF8) :]
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=most is None or len(raw) < most)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise LegolmError(f"{path}:{line}: {NOT_UTF8}") from None


def read_prose(paths: Sequence[Path], field: str, most: int, seed: int) -> str:
    """All files in order; where they have more than `most` bytes, about as many, from places that `seed` draws."""
    sizes = [check_prose(path, field) for path in paths]
    if sum(sizes) <= most:
        return "\n".join(read_text(path, field) for path in paths)
    span = most // SPANS
    places = [(path, start) for path, size in zip(paths, sizes, strict=True) for start in range(0, size, span)]
    drawn = random.Random(f"{seed} spans").sample(places, SPANS)
    return "\n".join(_span(path, field, start, span) for path, start in drawn)


def check_prose(path: Path, field: str) -> int:
    """The file's bytes. Raises `LegolmError` as `read_text` does; no more than a piece of it is in memory."""
    check_file(path, field)
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with reading(f"{field}: {path}"), path.open("rb") as file:
        for raw in iter(lambda: file.read(PIECE), b""):
            try:
                decoder.decode(raw)
            except UnicodeDecodeError as error:
                line += raw.count(b"\n", 0, error.start)
                raise LegolmError(f"{path}:{line}: {NOT_UTF8}") from None
            line += raw.count(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise LegolmError(f"{path}:{line}: {NOT_UTF8}") from None
    return path.stat().st_size


def _span(path: Path, field: str, start: int, length: int) -> str:
    """So many bytes, without half a character at either end."""
    with reading(f"{field}: {path}"), path.open("rb") as file:
        file.seek(start)
        return file.read(length).decode("utf-8", errors="ignore").removeprefix("\ufeff")
