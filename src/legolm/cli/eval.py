"""`legolm eval`: score models side by side."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import (
    Answer,
    BadRows,
    Input,
    Instruction,
    LayoutOption,
    Messages,
    Precision,
    Template,
    check_new,
    check_used,
    keeping,
    names_in,
    prompts_of,
    rows_of,
)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="RUN:CLIENT, a block's or a checkpoint's folder, `starter` or a hub id")
    ],
    tasks: Annotated[str | None, typer.Option(help="of lm-evaluation-harness: hellaswag,arc_easy")] = None,
    include: Annotated[Path | None, typer.Option(help="folder of your own YAML tasks; their code runs")] = None,
    data: Annotated[str | None, typer.Option(help="a file of instructions and answers")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for perplexity")] = None,
    base: Annotated[str | None, typer.Option(help="the LLM of the blocks, if it is not the starter")] = None,
    adapter: Annotated[Path | None, typer.Option(help="a PEFT adapter's folder, put on the model")] = None,
    rouge: Annotated[bool, typer.Option("--rouge", help="also generate the answers, for ROUGE-L; slow")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions of each task and of --data")] = None,
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    answer: Answer = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    template: Template = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a perplexity window, 1024")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="at most this many windows")] = None,
    precision: Precision = "fp32",
    out: Annotated[Path | None, typer.Option(help="JSON file of all figures, with every question's part")] = None,
) -> None:
    """Tasks, answers and perplexity, with standard errors; a block beside its LLM, with a paired test.

    With --out, a command that was killed goes on where it was.
    """
    check_used(data is not None, "--template", "--data")
    if out is not None:
        check_new(out)
    from legolm.config import RowsConfig, validate
    from legolm.evaluation import evaluate as evaluate_all
    from legolm.evaluation import kept_beside, line_up, read_questions, write_json
    from legolm.report import print_evaluation
    from legolm.system import Progress

    given = rows_of(layout, instruction, input, answer, messages, bad_rows)
    rows = validate(RowsConfig, given, "legolm eval") if given else None
    questions = read_questions(names_in(tasks, "--tasks"), include, data, rows, text, limit, rouge, length, windows)
    subjects = line_up(models, base, adapter)
    with nullcontext() if out is None else keeping(), kept_beside(out) as parts:
        found = evaluate_all(subjects, questions, precision, parts, prompts_of(template))
        if out is not None:
            write_json(found, questions, precision, out)
    for note in questions.notes:  # not before: bad input is one line
        Progress().note(note)
    print_evaluation(found)
    if out is not None:
        typer.echo(out)
