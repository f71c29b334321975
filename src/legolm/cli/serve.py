"""`legolm serve`: a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.export import Model
from legolm.cli.options import check_used, keeping
from legolm.errors import LegolmError


def serve(
    model: Model,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR: PEFT adapter of the model; repeat it")] = None,
    host: Annotated[str, typer.Option(help="who may ask: this machine alone if not given")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8080,
    quant: Annotated[str, typer.Option(help="f16, q8_0, q5_1, q5_0, q4_1 or q4_0; not of a GGUF file")] = "q8_0",
    parallel: Annotated[int, typer.Option(min=1, help="conversations at once")] = 1,
) -> None:
    """Serve a model, or a GGUF file, by llama.cpp until Ctrl-C; a request chooses its adapters."""
    from legolm.export import serving
    from legolm.models import is_gguf

    check_used(not is_gguf(Path(model)), "--quant", "a model that is no GGUF file yet")
    folder = Path(tempfile.gettempdir())
    with serving(model, adapter or [], host, port, quant, parallel, folder) as (server, numbers):
        typer.echo(f"{server.address}/v1/chat/completions")
        for name, number in numbers.items():
            typer.echo(f'adapter {name}: a request with "lora": {json.dumps([{"id": number, "scale": 1.0}])}')
        with keeping("the server is ended"):
            code = server.process.wait()
        raise LegolmError(f"the server of {model} ended by itself, with code {code}; start it again")
