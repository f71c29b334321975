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
    """Scores by token, the larger the sooner; ids of the bytes; whether a space is put before a text.

    `bare`: texts that begin with a space, and what follows a special token, get none in transformers.
    """

    scores: dict[str, float]
    bytes: frozenset[int]
    prefix: bool
    bare: bool

    @property
    def notes(self) -> list[str]:
        """What is other than in transformers."""
        return (
            [
                "llama.cpp puts a space before a text that begins with one and behind special tokens too, as "
                "SentencePiece does; this tokenizer in transformers does not"
            ]
            if self.bare
            else []
        )


def pieces_of(found: dict[str, Any], where: str) -> Pieces:
    """Of a `tokenizer.json` with byte fallback. Raises `LegolmError` for what llama.cpp would tokenize otherwise."""
    vocabulary: dict[str, int] = found["model"]["vocab"]
    if lacking := [byte for byte in BYTES if byte not in vocabulary]:
        raise LegolmError(f"{where}: has no token for {len(lacking)} of 256 bytes ({lacking[0]}); {WAY_OUT}")
    if found["model"].get("ignore_merges"):
        raise LegolmError(f"{where}: takes whole words before merges, which llama.cpp does not; {WAY_OUT}")
    prefix, bare = _prefix(found.get("normalizer"), found.get("pre_tokenizer"), where)
    merges = [tuple(one) if isinstance(one, list) else tuple(one.split(" ")) for one in found["model"]["merges"]]
    added = {one["content"] for one in found["added_tokens"]}
    return Pieces(_scores(vocabulary, merges, added, where), frozenset(vocabulary[one] for one in BYTES), prefix, bare)


def _prefix(normalizer: Any, pre: Any, where: str) -> tuple[bool, bool]:
    """(a space is put before a text, but not before one that begins with it or follows a special token)."""
    if normalizer == _PREPEND and pre is None:
        return True, False
    if normalizer == _REPLACE and pre in (None, _SPLIT):
        return False, False
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre["split"] and pre["replacement"] == SPACE:
        return pre["prepend_scheme"] != "never", pre["prepend_scheme"] != "never"
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
