"""SentencePiece's tokenizers in GGUF files: llama.cpp makes the tokens of a text that transformers makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError
from legolm.export import export
from legolm.export.gguf import TEXTS
from legolm.export.gguf_pieces import BYTES, SPACE
from legolm.export.gguf_tokens import vocabulary_of
from legolm.models import load_config

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

SPECIAL = ["<unk>", "<s>", "</s>"]
REPLACE = normalizers.Replace(" ", SPACE)
LLAMA = (normalizers.Sequence([normalizers.Prepend(SPACE), REPLACE]), None)
FIRST = (None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
ALWAYS = (None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False))
GEMMA = (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous"))
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }} {% endfor %}[assistant]"


@pytest.fixture(scope="module")
def pieces(corpus: Path) -> list[str]:
    """Tokens in the order in which BPE on characters finds them, as SentencePiece trains it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False)
    trained.train_from_iterator([corpus.read_text(), *TEXTS[:3] * 3], trainer)
    found = trained.get_vocab()
    return [*sorted(found, key=found.__getitem__), SPACE * 2, SPACE * 3]


def tokenizer_of(pieces: list[str], marks: tuple[Any, Any], change: Callable[[Any], None] = lambda merges: None) -> Any:
    """In transformers, with the merges that it makes of SentencePiece's scores."""
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *pieces]))}
    merges = generate_merges(vocabulary, {piece: -index for piece, index in vocabulary.items()}, SPECIAL)
    change(merges)
    model = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    model.normalizer, model.pre_tokenizer = marks
    model.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def saved(tokenizer: Any, tiny: Callable[[str], Path], path: Path) -> Path:
    config = load_config(tiny("llama"))
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer) + 3, 1, 2
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("marks", "template", "prefix", "note"),
    [
        (LLAMA, CHAT, True, None),
        (FIRST, None, True, "puts a space before a text that begins with one, too"),
        (FIRST, CHAT, False, "puts no space before a text: begin one that is no chat with a space"),
        (GEMMA, CHAT, False, None),
    ],
    ids=["llama", "first", "chats", "gemma"],
)
def test_llama_cpp_makes_the_same_tokens(
    marks: tuple[Any, Any],
    template: str | None,
    prefix: bool,
    note: str | None,
    pieces: list[str],
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_of(pieces, marks)
    if marks is FIRST and template:  # as Phi-3 has them
        tokenizer.add_special_tokens({"eos_token": AddedToken("</s>", rstrip=True)})
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.chat_template = template
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) - 10  # merges count
    # The export compares the tokens of texts, of chats, and how a text begins.
    found = export(str(saved(tokenizer, tiny, tmp_path / "m")), "gguf", tmp_path / "m.gguf", settings={"quant": "f16"})
    assert [line.removeprefix("llama.cpp ") for line in found.lines[:-2]] == [note] * bool(note)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == prefix
    assert ("phi-3" in fields["general.name"].contents()) == (not prefix and marks is FIRST)
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:4] == [3, 3, 3, 6] and kinds[-3:] == [5, 5, 5]  # control, byte, unused


def test_chats_that_llama_cpp_would_read_otherwise_are_refused(
    pieces: list[str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(pieces, ALWAYS)
    tokenizer.chat_template = CHAT
    done = legolm("export", saved(tokenizer, tiny, tmp_path / "m"), "--to", "gguf", "--out", tmp_path / "m.gguf")
    assert_one_line(done, "llama.cpp makes other tokens of '<s>[")
    assert not (tmp_path / "m.gguf").exists()


def test_what_sentencepiece_would_do_otherwise_is_refused_by_name(pieces: list[str]) -> None:
    def refused(tokenizer: Any, says: str) -> None:
        with pytest.raises(LegolmError, match=says):
            vocabulary_of(tokenizer, len(tokenizer), None)

    refused(tokenizer_of(pieces, LLAMA, lambda merges: merges.pop()), "does not join '▁' and '▁▁', whose token Sent")
    refused(tokenizer_of(pieces, LLAMA, lambda merges: merges.insert(0, merges.pop())), "not in the order of tokens")
    refused(tokenizer_of(pieces, (normalizers.NFKC(), None)), "marks words in a way that is not known .*NFKC")
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    refused(PreTrainedTokenizerFast(tokenizer_object=words), r"neither byte-level BPE nor SentencePiece's \(Unigram")
