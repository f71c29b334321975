"""`legolm generate`: answers to a file of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.export import Model
from legolm.cli.options import (
    BadRows,
    Input,
    Instruction,
    LayoutOption,
    Messages,
    Precision,
    Template,
    check_new,
    prompts_of,
    rows_of,
)


def generate(
    model: Model,
    data: Annotated[str, typer.Argument(help="questions: JSON, JSONL, CSV, Parquet, or hub:owner/name")],
    out: Annotated[Path, typer.Option(help="JSONL file: the rows, each with the answer")],
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    answer: Annotated[str, typer.Option(help="field that the answers go into")] = "answer",
    template: Template = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions at once")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 256,
    precision: Precision = "fp32",
) -> None:
    """Answer a file of questions; the likeliest token each time."""
    check_new(out)
    from legolm.config import RowsConfig, validate
    from legolm.data import written
    from legolm.evaluation import answer_rows
    from legolm.models import find_model
    from legolm.system import Progress, atomic_write

    rows = validate(RowsConfig, rows_of(layout, instruction, input, None, messages, bad_rows), "legolm generate")
    notes: list[str] = []
    path, prompts = find_model(model), prompts_of(template)
    found = answer_rows(path, data, answer, rows, batch_size, precision, max_tokens, prompts, notes)
    for note in notes:
        Progress().note(note)
    atomic_write(out, "".join(f"{written({**row, answer: text})}\n" for row, text in found))
    typer.echo(f"{len(found)} answers in {out}")
