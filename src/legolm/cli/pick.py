"""`legolm pick`: the best model that this device can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from legolm.cli.options import (
    Answer,
    BadRows,
    Input,
    Instruction,
    LayoutOption,
    Messages,
    Template,
    check_new,
    check_used,
    finite,
    prompts_of,
    rows_of,
)


def pick(
    models: Annotated[list[str], typer.Argument(help="a run's folder, RUN:CLIENT, folders, `starter` or hub ids")],
    data: Annotated[str, typer.Option(help="a file of questions and answers")],
    memory: Annotated[str | None, typer.Option(help="at most so much at the peak: 300MB")] = None,
    min_tokens_per_s: Annotated[float, typer.Option(min=0, callback=finite, help="at least so many generated")] = 0.0,
    runtime: Annotated[Literal["llama.cpp", "transformers"], typer.Option(help="that will be used")] = "llama.cpp",
    quant: Annotated[str, typer.Option(help="llama.cpp: f16, q8_0, q5_1, q5_0, q4_1 or q4_0")] = "q8_0",
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    answer: Answer = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    template: Template = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions")] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG file of the trade-off")] = None,
) -> None:
    """Measure models on this device, and name the best of those that fit."""
    check_used(runtime == "llama.cpp", "--quant", "--runtime llama.cpp")
    if picture is not None:
        check_new(picture, field="--picture")
    from legolm.config import RowsConfig, parse_quantity, validate
    from legolm.errors import LegolmError
    from legolm.export import candidates
    from legolm.export import pick as choose
    from legolm.report import draw_tradeoff, need_matplotlib, print_picked
    from legolm.system import Progress, atomic_write

    if picture is not None:
        need_matplotlib()
    try:
        most = float("inf") if memory is None else float(parse_quantity(memory))
    except ValueError as error:
        raise LegolmError(f"--memory {memory}: {error}") from None
    rows = validate(RowsConfig, rows_of(layout, instruction, input, answer, messages, bad_rows), "legolm pick")
    notes: list[str] = []
    found = candidates(models, data, rows, runtime, quant, limit, prompts_of(template), notes)
    for note in notes:  # not before: bad input is one line
        Progress().note(note)
    best = choose(found, most, min_tokens_per_s)
    print_picked(found, best, most, min_tokens_per_s)
    if picture is not None:
        atomic_write(picture, draw_tradeoff(found, best, most, min_tokens_per_s))
        typer.echo(picture)
