"""`legolm compose`: put together what blocks learned."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from legolm.cli.export import export, settings_of
from legolm.cli.options import (
    Answer,
    BadRows,
    Input,
    Instruction,
    LayoutOption,
    Messages,
    check_new,
    keeping,
    rows_of,
)
from legolm.errors import LegolmError


def compose(
    sources: Annotated[
        list[str], typer.Argument(help="RUN:CLIENT, folders of a run's final/, or BLOCK:ADAPTER (PEFT)")
    ],
    into: Annotated[str, typer.Option(help="llm, union, layers=30,kv_groups=3,neurons=1536, or a block's folder")],
    out: Annotated[Path, typer.Option(help="folder of the composed model")],
    base: Annotated[str | None, typer.Option(help="the LLM; what the sources' run recorded if not given")] = None,
    method: Annotated[str, typer.Option(help="heteagg, task_arithmetic or ties")] = "heteagg",
    form: Annotated[str | None, typer.Option(help="heteagg: exact (products, default) or factor")] = None,
    scaling: Annotated[float | None, typer.Option(help="task_arithmetic, ties: factor of the change, 1")] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of each change that is kept, 0.2")] = None,
    weights: Annotated[str | None, typer.Option(help="one a source: 1,2,1; by training examples if not given")] = None,
    validate: Annotated[str | None, typer.Option(help="weights by loss on this file of instructions, answers")] = None,
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    answer: Answer = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    then: Annotated[str | None, typer.Option(help="of what was composed: 'export --to gguf --out both.gguf'")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what is held and covered, and stop")] = False,
) -> None:
    """Combine what separately trained blocks learned into one block, or into the LLM."""
    check_new(out)
    after = None if then is None else _parsed(then, out)

    given = rows_of(layout, instruction, input, answer, messages, bad_rows)
    if given and validate is None:
        raise LegolmError("--layout and names of fields: only with --validate; give that too, or leave them out")

    from legolm.composition import Composition, choose_method, plan
    from legolm.composition import compose as put_together
    from legolm.config import RowsConfig
    from legolm.config import validate as checked
    from legolm.export import check_composed
    from legolm.report import print_blocks, print_composition
    from legolm.system import Progress

    progress = Progress()
    chosen = choose_method(method, form, scaling, density)

    def check(planned: Composition) -> None:
        if after is not None:
            options, _ = after
            settings = settings_of(options["quant"], options["push_to_hub"])
            adapter = None if options["adapter"] is None else Path(options["adapter"])
            check_composed(planned, out, options["to"], adapter, settings)

    rows = checked(RowsConfig, given, "legolm compose")
    wanted = plan(sources, into, base, chosen, weights, validate, progress, rows, check)
    if dry_run:
        print_composition(wanted)
        return
    print_blocks([put_together(wanted, out, progress)])
    if after is not None:
        _, export_it = after
        with keeping(f"{out} is composed; nothing was exported"):
            export_it()


def _parsed(then: str, out: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """Options, and what exports the folder `out`. Raises `LegolmError` for another command and a bad one."""
    from legolm.export import target_of

    try:
        word, *words = shlex.split(then)
    except ValueError:
        word, words = then, []
    if word != "export":
        raise LegolmError(f"--then {then!r}: must be an export: 'export --to gguf --out FILE'")
    command = typer.Typer(add_completion=False)
    command.command()(export)
    made: Any = typer.main.get_command(command)
    context = made.make_context("compose --then export", [str(out), *words])
    given = context.params
    if Path(given["out"]).resolve() == out.resolve():
        raise LegolmError(f"--then: --out {given['out']} is the composed model's own; give another one")
    check_new(Path(given["out"]))
    target_of(given["to"], settings_of(given["quant"], given["push_to_hub"])).need()
    return given, lambda: made.invoke(context)
