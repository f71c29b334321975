"""`legolm calibrate`: sums of private text, for `legolm prune --statistics`."""

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
    Precision,
    Template,
    check_new,
    prompts_of,
    rows_of,
)


def calibrate(
    model: Annotated[str, typer.Argument(help="`starter`, a local folder or a hub id")],
    text: Annotated[str, typer.Option(help="a text file or a file of conversations; it stays where it is")],
    out: Annotated[Path, typer.Option(help="file of sums to write")],
    needs: Annotated[
        Literal["diagonal", "full"], typer.Option(help="squares only (wanda), or all second moments")
    ] = "full",
    samples: Annotated[int, typer.Option(help="samples of the text")] = 32,
    length: Annotated[int, typer.Option(help="tokens a sample")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    answer: Answer = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    template: Template = None,
    precision: Precision = "fp32",
) -> None:
    """Private calibration: write sums of activation statistics, which `legolm prune --statistics` adds up."""
    from legolm.config import CalibrationConfig, validate

    rows = rows_of(layout, instruction, input, answer, messages, bad_rows)
    given = {"text": text, "samples": samples, "length": length} | rows
    settings = validate(CalibrationConfig, given, "legolm calibrate")
    check_new(out)

    from legolm.data import calibration_tokens, check_text
    from legolm.models import fingerprint, load_tokenizer, resolve
    from legolm.prune import collect, save_statistics
    from legolm.system import Progress

    base, progress = resolve(model), Progress()
    notes = check_text(text, settings, "--text")
    tokens = calibration_tokens(settings, load_tokenizer(base, prompts_of(template)), seed)
    save_statistics(collect(base, fingerprint(base), tokens, needs, precision, progress), out)
    for note in notes:  # not before: bad input is one line
        progress.note(note)
    typer.echo(out)
