"""A folder for `ollama create`: the merged model as GGUF, and a Modelfile that says how it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from legolm.data import render_template
from legolm.errors import LegolmError
from legolm.export.gguf import PACKAGES, described, write_checked
from legolm.export.gguf_write import Quant
from legolm.export.source import Source
from legolm.export.target import exporter

GGUF, MODELFILE = "model.gguf", "Modelfile"
MARKS = ("(first)", "(second)", "(third)", "(fourth)", "(fifth)", "(sixth)")
ROLES = ("system", "user", "assistant", "user", "assistant", "user")


def _check(source: Source, **_: object) -> None:
    _modelfile(source)


def _command(out: Path, **_: object) -> list[str]:
    """What brings it into ollama: not before the folder has its name."""
    return [f"ollama create NAME -f {quote(str(out / MODELFILE))}"]


@exporter("ollama", packages=PACKAGES, extra="gguf", check=_check, publish=_command)
def ollama(source: Source, out: Path, *, quant: Quant = "q8_0") -> list[str]:
    """A folder. The file is compared in llama.cpp, which ollama runs; the Modelfile's prompts with the template's."""
    out.mkdir()
    (out / MODELFILE).write_text(_modelfile(source), encoding="utf-8")
    return write_checked(source, out / GGUF, quant)


def _modelfile(source: Source) -> str:
    """Raises `LegolmError` for what cannot be written for llama.cpp, or asked by ollama."""
    layout, vocabulary = described(source)
    ends = {vocabulary.tokens[vocabulary.special[kind]] for kind in ("eos", "eot") if kind in vocabulary.special}
    lines = ["FROM ./model.gguf", f"PARAMETER num_ctx {min(layout.context, 4096)}"]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in sorted(ends)]
    if source.tokenizer.chat_template:
        begin = source.tokenizer.bos_token if vocabulary.begins else ""  # ollama puts it there by itself
        lines.append(f'TEMPLATE """{_template(source, begin)}"""')
    return "\n".join(lines) + "\n"


def _template(source: Source, begin: str) -> str:
    """The chat template as Go's, without what every text begins with: what stands before, between and after the turns
    of conversations.

    Raises `LegolmError` for one that does more than put something there.
    """
    tokenizer = source.tokenizer
    first, answer = _pieces(tokenizer, 1, 2)
    start, answer_too, after, _ = _pieces(tokenizer, 1, 4)
    try:
        before_system, after_system, *_ = _pieces(tokenizer, 0, 2)
    except LegolmError:  # a template without system messages
        before_system, after_system = "", ""
    whole = [before_system, after_system, answer, after, answer, after, answer]
    if (first, answer) != (start, answer_too) or (after_system and _pieces(tokenizer, 0, 6) != whole):
        raise LegolmError(f"--to ollama: the chat template of {source.name} is more than turns; --to gguf can hold it")
    turns = {
        "system": (before_system.removeprefix(begin), after_system),
        "user": (f"{{{{ if eq $i 0 }}}}{_literal(first.removeprefix(begin))}{{{{ end }}}}", answer),
        "assistant": ("", after),
    }
    cases = "".join(
        f'{{{{ if eq $m.Role "{role}" }}}}{before if role == "user" else _literal(before)}{{{{ $m.Content }}}}'
        f"{_literal(behind)}{{{{ end }}}}"
        for role, (before, behind) in turns.items()
    )
    return f"{{{{ range $i, $m := .Messages }}}}{cases}{{{{ end }}}}"


def _pieces(tokenizer: Any, start: int, end: int) -> list[str]:
    """What the template writes around the contents of a conversation that the model is to go on with."""
    turns = [{"role": ROLES[i], "content": MARKS[i]} for i in range(start, end)]
    (text,) = render_template(tokenizer, [(turns, True, "")])
    pieces = []
    for mark in MARKS[start:end]:
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _literal(text: str) -> str:
    """Text in a Go template, whatever it holds."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
