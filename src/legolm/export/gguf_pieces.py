"""SentencePiece's tokenizers (Llama 2, Gemma), as `tokenizer.json` has them: BPE on characters, other bytes by number.

SentencePiece, and llama.cpp after it, joins the neighbours that make the token of the best score. transformers joins by
a list of pairs. The two are the same where the list has every pair that makes a token, in the order of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from legolm.errors import LegolmError, brief

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE]}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
WAY_OUT = "export to hf or onnx"


@dataclass(frozen=True)
class Pieces:
    """Scores by token, the larger the sooner; ids of the bytes; where a space is put.

    `prefix`: llama.cpp puts one before a text and behind special tokens. `first`: transformers puts one before a text
    only, not behind special tokens. `keeps`: it puts none where there is one.
    """

    scores: dict[str, float]
    bytes: frozenset[int]
    prefix: bool
    first: bool
    keeps: bool

    @property
    def notes(self) -> list[str]:
        """What is other than in transformers."""
        if self.first and not self.prefix:
            return ["llama.cpp puts no space before a text: begin one that is no chat with a space"]
        if self.keeps:
            return ["llama.cpp puts a space before a text that begins with one, too"]
        return []

    def text(self, text: str) -> str:
        """What llama.cpp must be given to make the tokens that transformers makes of a text."""
        begun = text.lstrip(" ") if self.keeps else text
        return f" {begun}" if self.first and not self.prefix else begun


def pieces_of(found: dict[str, Any], chats: bool, where: str) -> Pieces:
    """Of a `tokenizer.json` with byte fallback; `chats`: it has a chat template.

    llama.cpp puts a space both before a text and behind special tokens, or nowhere. Where transformers does so before a
    text only, that is nowhere for chats, which begin with a special token.

    Raises `LegolmError` for what llama.cpp would tokenize otherwise.
    """
    vocabulary: dict[str, int] = found["model"]["vocab"]
    if lacking := [byte for byte in BYTES if byte not in vocabulary]:
        raise LegolmError(f"{where}: has no token for {len(lacking)} of 256 bytes ({lacking[0]}); {WAY_OUT}")
    if found["model"].get("ignore_merges"):
        raise LegolmError(f"{where}: takes whole words before merges, which llama.cpp does not; {WAY_OUT}")
    merges = [tuple(one) if isinstance(one, list) else tuple(one.split(" ")) for one in found["model"]["merges"]]
    added = {one["content"] for one in found["added_tokens"]}
    scheme = _scheme(found.get("normalizer"), found.get("pre_tokenizer"), where)
    return Pieces(
        scores=_scores(vocabulary, merges, added, where),
        bytes=frozenset(vocabulary[one] for one in BYTES),
        prefix=scheme != "never" and not (scheme == "first" and chats),
        first=scheme == "first",
        keeps=scheme in ("first", "always"),
    )


def _scheme(normalizer: Any, pre: Any, where: str) -> str:
    """Where a space is put: before each part, whatever it begins with; always, first or never, as `Metaspace` does."""
    if normalizer == _PREPEND and pre is None:
        return "each"
    if normalizer == _REPLACE and pre in (None, _SPLIT):
        return "never"
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre["split"] and pre["replacement"] == SPACE:
        return str(pre["prepend_scheme"])
    raise LegolmError(
        f"{where}: marks words in a way that is not known of llama.cpp ({brief(json.dumps([normalizer, pre]))}); "
        f"{WAY_OUT}"
    )


def _scores(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]], added: set[str], where: str
) -> dict[str, float]:
    """Of each token that merges make: the number of others that are made sooner, negative."""
    order = ["".join(pair) for pair in merges]
    runs = [token for token, _ in groupby(order)]
    scores = {token: -float(place) for place, token in enumerate(runs)}
    pairs = set(merges)
    if len(scores) < len(runs):
        raise LegolmError(f"{where}: its merges are not in the order of tokens, as SentencePiece has them; {WAY_OUT}")
    for token in vocabulary.keys() - added:
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            known = all(len(part) == 1 or (part in vocabulary and part not in added) for part in (left, right))
            if known and (left, right) not in pairs:
                raise LegolmError(
                    f"{where}: does not join {left!r} and {right!r}, whose token SentencePiece would take; {WAY_OUT}"
                )
    return scores
