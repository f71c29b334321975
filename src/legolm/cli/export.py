"""`legolm export`: a model for the runtime that is to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import Stopped, check_new

Model = Annotated[str, typer.Argument(help="RUN:CLIENT (what it ended with; RUN:llm), a folder, `starter` or a hub id")]


def export(
    model: Model,
    to: Annotated[str, typer.Option(help="hf, adapter, gguf, gguf-adapter, onnx, sparse or ollama")],
    out: Annotated[Path, typer.Option(help="file (gguf) or folder that is written")],
    adapter: Annotated[
        Path | None, typer.Option(help="a PEFT adapter of the block, merged or exported with it")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="gguf, ollama: f32, f16, q8_0 (default), q5_1 ... q4_0")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="hf: owner/name, private")] = None,
) -> None:
    """Write a model for another runtime, and check there that it computes the same."""
    from legolm.export import export as write

    check_new(out)
    try:
        found = write(model, to, out, adapter, settings_of(quant, push_to_hub))
    except KeyboardInterrupt:
        if not out.exists():
            raise
        raise Stopped(f"{out} is written; the hub may have a part of it") from None
    for line in found.lines:
        typer.echo(line)
    typer.echo(f"{found.bytes / 1e6:,.1f} MB in {found.path}")


def settings_of(quant: str | None, push_to_hub: str | None) -> dict[str, str]:
    """Of the format, those that are given."""
    given = {"quant": quant, "push_to_hub": push_to_hub}
    return {name: value for name, value in given.items() if value is not None}
