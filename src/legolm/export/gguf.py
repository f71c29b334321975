"""GGUF, for llama.cpp and all that is built on it: ollama, LM Studio, jan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from legolm.data import Example, Message, render, render_template, special_ids
from legolm.errors import LegolmError
from legolm.export.gguf_balance import balance_of
from legolm.export.gguf_layout import Layout, layout_of
from legolm.export.gguf_tokens import Vocabulary, vocabulary_of
from legolm.export.gguf_write import Quant, write_gguf
from legolm.export.llama_cpp import LlamaCpp, llama_cpp
from legolm.export.probe import LIKELIEST, Limits, Measured, Reference, measure
from legolm.export.source import Source
from legolm.export.target import exporter

PACKAGES = ("gguf", "xllamacpp")
EXACT = Limits(0.01)
LIMITS = {
    "f32": EXACT,
    "f16": EXACT,
    "q8_0": Limits(0.5, 0.1),
    "q5_1": Limits(1.5, 1.0),
    "q5_0": Limits(1.5, 1.0),
    "q4_1": Limits(2.0, 2.0),
    "q4_0": Limits(2.0, 2.0),
}
"""Of f16, whose products llama.cpp makes in float16. The others lose what their bits lose, a block that was cut and not
recovered the most: half of SmolLM2 in q8_0 has error 0.11 and KL 0.005."""
EXACT_ASKED, ASKED, READ = 16, 96, 32
"""Tokens whose distributions are compared of an exact file and of a quantized one, and tokens that are read before."""
TEXTS = (
    "Hello, world! It's 12345 o'clock; we'd say 3.14 isn't 22/7.",
    "  two spaces,\ttab\n\nnew   lines \r\n and trailing   ",
    "Ünïcödé naïve Straße, русский текст, 中文字符, 日本語, ไทย, 🚀🙂",
    "def f(x_1):\n    return {'a': [x_1**2, 0x1F]}  # CamelCase HTTPServer\n",
    "I'VE SHE'LL They'Re 1a2b 007 1,000,000 -- ... ?!",
    "".join(" " * count + "x" + "\n" * count for count in range(1, 13)),
)
CHATS = (
    [("user", "Hi.")],
    [("system", "Be brief."), ("user", "What is 2+2?"), ("assistant", "4"), ("user", "And 3+3?")],
)


def _check(source: Source, **_: object) -> None:
    described(source)


@exporter("gguf", packages=PACKAGES, extra="gguf", check=_check)
def gguf(source: Source, out: Path, *, quant: Quant = "q8_0") -> list[str]:
    """One file, everything merged."""
    return write_checked(source, out, quant)


def write_checked(source: Source, out: Path, quant: Quant) -> list[str]:
    """Write and compare. A quantized file is written in f16 first, which must compute exactly what the checkpoint does.

    Raises `LegolmError` for what cannot be written, and where tokens, prompts or distributions differ.
    """
    layout, vocabulary = described(source)
    model = source.load()
    exact = Reference.of(model, source.tokenizer, *spans(layout, EXACT_ASKED))
    lossy = None if quant in ("f16", "f32") else Reference.of(model, source.tokenizer, *spans(layout, ASKED))
    balance = balance_of(model, source.tokenizer, layout)
    del model
    lines = [*layout.notes, *vocabulary.notes]
    if lossy is not None:
        whole = source.scratch / "whole.gguf"
        write_gguf(source.path, whole, layout, vocabulary, "f16", source.block.name, balance)
        verify(source, whole, exact, "f16", vocabulary)
        whole.unlink()
    written = write_gguf(source.path, out, layout, vocabulary, quant, source.block.name, balance)
    found = verify(source, out, lossy or exact, quant, vocabulary)
    lines += written.notes()
    if source.coverage.masks:
        lines.append("the zeros of its bit masks are written out: GGUF has no sparse form, and they save nothing there")
    if not source.learned:
        lines.append("its channels are balanced: LoRA files for it are those of --to gguf-adapter, and no others")
    lines.append(f"llama.cpp, {quant}: {found.said()}")
    return lines


def described(source: Source) -> tuple[Layout, Vocabulary]:
    """What is known before any weight is read. Raises `LegolmError` for what cannot be written."""
    layout = layout_of(source.config, source.name)
    tokenizer, turn = source.tokenizer, None
    if tokenizer.chat_template:
        messages = (Message("user", "a"), Message("assistant", "b"))
        end = render(Example(messages), tokenizer, layout.context).ids[-1]
        turn = end if end in special_ids(tokenizer) and end != tokenizer.eos_token_id else None
    return layout, vocabulary_of(tokenizer, source.config.vocab_size, turn)


def spans(layout: Layout, asked: int) -> tuple[int, int]:
    """Tokens to read and to ask for: past the window of a model with windows, within the context."""
    window = int(layout.metadata.get("attention.sliding_window", 0))
    asked = min(asked, layout.context // 2)
    return min(max(READ, window + RUN_OVER if window else 0), layout.context - asked), asked


RUN_OVER = 8
"""Tokens that are read beyond a window."""


def verify(
    source: Source,
    file: Path,
    reference: Reference,
    quant: Quant,
    vocabulary: Vocabulary,
    adapters: Sequence[tuple[Path, float]] = (),
) -> Measured:
    """Load the file, compare tokens, templates and distributions. Raises `LegolmError` where they differ."""
    with llama_cpp(file, len(reference.ids) + 8, adapters) as runtime:
        _check_tokens(source, vocabulary, runtime)

        def answer(ids: Sequence[int], token: int) -> tuple[float, dict[int, float]]:
            found = runtime.next(ids, token, LIKELIEST)
            return found.asked, found.likeliest

        found = measure(reference, answer)
    LIMITS[quant].check(found, f"{source.name}: llama.cpp ({quant})")
    return found


def _check_tokens(source: Source, vocabulary: Vocabulary, runtime: LlamaCpp) -> None:
    tokenizer = source.tokenizer
    keeps = vocabulary.pieces is not None and vocabulary.pieces.keeps
    texts = [(text.lstrip(" ") if keeps else text, vocabulary.text(text)) for text in TEXTS]
    if tokenizer.chat_template:
        chats = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
        for chat in chats:
            try:
                (wanted,) = render_template(tokenizer, [(chat, True, "")])
            except LegolmError:  # a template without system messages, say
                continue
            found = runtime.template(chat)
            begin = tokenizer.bos_token or ""
            if found.removeprefix(begin) != wanted.removeprefix(begin):
                raise LegolmError(
                    f"{source.name}: llama.cpp makes another prompt of its chat template: {found!r}, not {wanted!r}"
                )
            texts.append((wanted, wanted))
    for text, given in texts:
        found_ids, wanted_ids = runtime.tokenize(given), tokenizer.encode(text, add_special_tokens=False)
        if found_ids != list(wanted_ids):
            raise LegolmError(f"{source.name}: llama.cpp makes other tokens of {text!r}: {found_ids}, not {wanted_ids}")
    begun = tokenizer.encode("a"), runtime.tokenize(vocabulary.text("a"), special=True)
    if list(begun[0]) != begun[1]:
        raise LegolmError(f"{source.name}: llama.cpp begins a text with other tokens: {begun[1]}, not {begun[0]}")
