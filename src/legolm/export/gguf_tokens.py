"""A tokenizer as a GGUF file has it: byte-level BPE, its pre-tokenizer found by what it splits, or SentencePiece's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from legolm.data import dated_template
from legolm.errors import LegolmError, brief
from legolm.export.gguf_pieces import Pieces, pieces_of
from legolm.models import DIGIT, GPT2, SPLITS

PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens without which llama.cpp does not load what is called Phi-3."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their kinds, what ends and begins texts. `notes` say what is other than in transformers.

    Of byte-level BPE `merges` and `pre`; of SentencePiece `pieces`. `strips`: special tokens take the blanks behind
    them, as Phi-3's do.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    begins: bool
    template: str | None
    notes: list[str]
    pieces: Pieces | None = None
    strips: bool = False

    def text(self, text: str) -> str:
        """What llama.cpp must be given to make the tokens that transformers makes of a text that is no chat."""
        return self.pieces.text(text) if self.pieces else text


def vocabulary_of(tokenizer: Any, rows: int, end_of_turn: int | None) -> Vocabulary:
    """Of a model with so many rows of embeddings. Raises `LegolmError` for a tokenizer that llama.cpp does not have.

    `end_of_turn` ends an answer, where that is another token than the end of texts.
    """
    import gguf

    where = f"tokenizer of {tokenizer.name_or_path}"
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [" ".join(one) if isinstance(one, list) else one for one in found["model"].get("merges", [])]
    pieces, pre, notes = None, "default", []
    if found["model"]["type"] == "BPE" and found["model"].get("byte_fallback"):
        pieces, merges = pieces_of(found, bool(tokenizer.chat_template), where), []
        notes += pieces.notes
    else:
        pre = _pre(found, merges, where)
        notes += ["texts are not brought to NFC, as transformers does"] if found.get("normalizer") else []
    template, note = dated_template(tokenizer)
    notes += note
    text = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for index in range(rows):
        tokens.append(text.get(index, f"[PAD{index}]"))
        if index not in text:
            types.append(kinds.UNUSED)
        elif index in added:
            types.append(kinds.CONTROL if added[index].special else kinds.USER_DEFINED)
        elif pieces is not None and index in pieces.bytes:
            types.append(kinds.BYTE)
        else:
            types.append(kinds.NORMAL)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "eot": end_of_turn}
    special |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return Vocabulary(
        tokens=tokens,
        kinds=[int(one) for one in types],
        merges=merges,
        pre=pre,
        special={name: index for name, index in special.items() if index is not None and index < rows},
        begins=begins,
        template=template,
        notes=notes,
        pieces=pieces,
        strips=any(one.rstrip for one in added.values()) and set(PHI3) <= set(text.values()),
    )


def _pre(found: dict[str, Any], merges: list[str], where: str) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer, from `tokenizer.json`."""
    model, normalizer = found["model"], (found.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or normalizer not in (None, "NFC"):
        raise LegolmError(
            f"{where}: is neither byte-level BPE nor SentencePiece's ({model['type']}, normalizer {normalizer}), which "
            "alone are written for llama.cpp; export to hf or onnx"
        )
    key = (_splits(found.get("pre_tokenizer"), where), bool(model.get("ignore_merges")))
    names = SPLITS.get(key) if merges else ("gpt-2",)  # where every byte is a token, all split alike
    if names is None:
        known = ", ".join(names[0] for names in SPLITS.values())
        raise LegolmError(
            f"{where}: its pre-tokenizer {brief(json.dumps(list(key)))} is none that is known of llama.cpp ({known}); "
            "export to hf or onnx"
        )
    return names[0]


def _splits(pre: Any, where: str) -> tuple[str, ...]:
    """Patterns that split a text, each what the one before left; bytes come last."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    patterns = []
    for part in parts:
        if part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(DIGIT)
        elif part["type"] == "Split" and "Regex" in part["pattern"] and part["behavior"] in ("Isolated", "Removed"):
            if (part["behavior"] == "Removed") != part["invert"]:
                patterns.append(f"{part['behavior']}: {part['pattern']['Regex']}")
            else:
                patterns.append(part["pattern"]["Regex"])
        elif part["type"] == "ByteLevel" and part is parts[-1] and not part["add_prefix_space"]:
            patterns += [GPT2] if part.get("use_regex", True) else []
            return tuple(patterns)
        else:
            patterns.append(part["type"])
    raise LegolmError(
        f"{where}: its pre-tokenizer ({', '.join(patterns) or 'none'}) does not end with bytes; export to hf or onnx"
    )
