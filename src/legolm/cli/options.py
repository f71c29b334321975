"""What several commands share: their options, and the checks of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from click.core import ParameterSource

from legolm.errors import LegolmError

if TYPE_CHECKING:
    from legolm.config import DataConfig

Config = Annotated[Path, typer.Argument(help="YAML config of the run; see examples/")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of matrix products")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a value: a.b=value; may be repeated")]

LayoutOption = Annotated[
    str | None, typer.Option(help="of rows: auto, alpaca, dolly, sharegpt, messages, pairs or text")
]
Instruction = Annotated[str | None, typer.Option(help="field of the instruction, where it has another name")]
Input = Annotated[str | None, typer.Option(help="field of what stands beside the instruction")]
Answer = Annotated[str | None, typer.Option(help="field of the answer")]
Messages = Annotated[str | None, typer.Option(help="instead of these: field of a list of turns")]

BadRows = Annotated[str | None, typer.Option(help="refuse (name them all) or skip (leave them out)")]
Template = Annotated[
    str | None, typer.Option(help="of prompts, instead of the model's own: alpaca, chatml, or a file in Jinja")
]


def finite(param: typer.CallbackParam, given: float | None) -> float | None:
    """Callback of an option whose bounds nan and inf pass. Raises `LegolmError` for them."""
    if given is not None and not math.isfinite(given):
        raise LegolmError(f"{param.opts[0]} {given}: must be a finite number")
    return given


def prompts_of(template: str | None) -> DataConfig | None:
    """How prompts look, as a run's config has it; None: as each model's own."""
    if template is None:
        return None
    from legolm.config import DataConfig, validate

    return validate(DataConfig, {"template": template}, "--template")


def rows_of(
    layout: str | None,
    instruction: str | None,
    input: str | None,
    answer: str | None,
    messages: str | None,
    bad_rows: str | None,
) -> dict[str, Any]:
    """How rows are read, as a config has it; nothing where no option is given."""
    named = {"instruction": instruction, "input": input, "answer": answer, "messages": messages}
    fields = {name: field for name, field in named.items() if field is not None}
    if messages is not None and len(fields) > 1:
        raise LegolmError(f"--messages {messages}: instead of --instruction and its like; give the one or the others")
    given = {"layout": layout, "fields": fields or None, "bad_rows": bad_rows}
    return {name: value for name, value in given.items() if value is not None}


class Stopped(Exception):
    """Ctrl-C or SIGTERM where something is kept: the text says what, and how to go on."""


@contextmanager
def keeping(what: str = "what is finished is kept; the same command goes on there") -> Iterator[None]:
    """Say this of a block that is stopped. Of a command without it nothing was written."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(what) from None


def check_new(out: Path, field: str = "--out") -> None:
    """Raise `LegolmError` when `out` is there or cannot be made: before the work, not after it."""
    from legolm.system import check_new as check

    check(out, field=field)


def check_used(used: bool, options: str, wants: str) -> None:
    """Raise `LegolmError` where one of `options` ("--a, --b") is given on the command line and is not `used`."""
    given = click.get_current_context().get_parameter_source
    for option in () if used else options.split(", "):
        if given(option.strip("-").replace("-", "_")) is ParameterSource.COMMANDLINE:
            raise LegolmError(f"{option}: only with {wants}; give that too, or leave it out")


def names_in(listed: str | None, option: str) -> list[str]:
    """The names in `--tasks a,b`, none when it is not given. Raises `LegolmError` when it is given and names none."""
    names = [name.strip() for name in (listed or "").split(",") if name.strip()]
    if listed is not None and not names:
        raise LegolmError(f"{option} {listed!r}: names none; write names with commas between them")
    return names
