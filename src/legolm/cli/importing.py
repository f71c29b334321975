"""`legolm import`: make a checkpoint to prune of a quantized or multimodal one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import check_new


def import_model(
    model: Annotated[str, typer.Argument(help="a GGUF file, a local folder or a hub id")],
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")],
) -> None:
    """Dequantize a model (GGUF, GPTQ, AWQ, FP8, bitsandbytes), or take the text part of a multimodal one."""
    check_new(out)
    from legolm.models import import_model as import_one
    from legolm.system import Progress

    import_one(model, out, Progress())
    typer.echo(out)
