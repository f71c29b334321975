"""`legolm ablate`: leave blocks and clients out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import keeping, names_in
from legolm.errors import LegolmError


def ablate(
    folder: Annotated[Path, typer.Argument(help="run folder, made with federation.keep_updates: true")],
    out: Annotated[Path | None, typer.Option(help="folder of ablation.json and .html; RUN if not given")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="run again without each instead, in OUT/without; needs no kept updates")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="blocks and clients to leave out: small,clinic-a; all if not given")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="that the LLM answers: hellaswag,arc_easy")] = None,
    include: Annotated[Path | None, typer.Option(help="folder of your own YAML tasks; their code runs")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions of each task")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for the LLM's perplexity")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a perplexity window, 1024")] = None,
) -> None:
    """Leave each block, then each client, out of a run: replay its aggregation, or train again. Goes on where an
    earlier call stopped."""
    from legolm.evaluation import read_questions
    from legolm.report import print_ablation
    from legolm.study import ablate as leave_out
    from legolm.system import Progress, check_room

    if not folder.is_dir():
        raise LegolmError(f"run folder {folder}: no such folder; give that of a run")
    check_room(out or folder)
    names, questions = names_in(tasks, "--tasks"), None
    if limit and not names:
        raise LegolmError("--limit: only with --tasks; give that too, or leave it out")
    if names or text or include or limit or length:
        questions = read_questions(names, include, None, None, text, limit, length=length)
    with keeping():
        found = leave_out(folder, out or folder, questions, Progress(), retrain, names_in(only, "--only"))
    print_ablation(found, out or folder)
