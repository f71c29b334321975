"""`legolm chat`: talk to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.export import Model
from legolm.cli.options import Template, check_used, prompts_of
from legolm.errors import LegolmError


def chat(
    model: Model,
    compare: Annotated[bool, typer.Option("--compare", help="its LLM answers too")] = False,
    adapter: Annotated[Path | None, typer.Option(help="a PEFT adapter's folder, put on the model")] = None,
    base: Annotated[str | None, typer.Option(help="with --compare: the LLM, if the block does not record it")] = None,
    template: Template = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0: the likeliest token each time")] = 0.0,
) -> None:
    """Talk to a model: a line is a message, an empty one begins anew, Ctrl-D ends."""
    check_used(compare, "--base", "--compare")
    if temperature and not 0.01 <= temperature <= 10:  # NaN, which is no less than any number; what divides to infinity
        raise LegolmError(f"--temperature {temperature:g}: must be 0, the likeliest token each time, or 0.01 to 10")
    from legolm.data import Message, prompt_look, take_look
    from legolm.evaluation import alone, line_up, load_subject, reply
    from legolm.models import find_model, load_tokenizer

    path = find_model(model)
    subjects = line_up([str(path)], base, adapter) if compare else [alone(model, path, adapter)]
    loaded = [(load_subject(one), load_tokenizer(one.path, prompts_of(template))) for one in subjects]
    for one, tokenizer in loaded:
        one.config.use_cache = True
        take_look(tokenizer, prompt_look(loaded[-1][1]))  # the LLM is asked as its block is
    begin = [] if system is None else [Message("system", system)]
    talks = [list(begin) for _ in subjects]
    while (line := _ask()) is not None:
        if not line.strip():
            talks = [list(begin) for _ in subjects]
            continue
        for subject, (one, tokenizer), talk in zip(subjects, loaded, talks, strict=True):
            talk.append(Message("user", line))
            if len(subjects) > 1:
                typer.echo(f"[{subject.name}] ", nl=False)
            answer = ""
            for piece in reply(one, tokenizer, talk, max_tokens, temperature):
                typer.echo(piece, nl=False)
                answer += piece
            typer.echo()
            talk.append(Message("assistant", answer))


def _ask() -> str | None:
    """The next line; None at the end. Raises `LegolmError` for bytes that are no text."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        line.encode()
    except EOFError:
        return None
    except UnicodeError:
        raise LegolmError("a message is not UTF-8 text; write it as such") from None
    return line
