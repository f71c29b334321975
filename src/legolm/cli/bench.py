"""`legolm bench`: what models cost on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from legolm.cli.options import check_used


def bench(
    models: Annotated[list[str], typer.Argument(help="RUN:CLIENT, folders, `starter` or hub ids")],
    runtimes: Annotated[str, typer.Option(help="llama.cpp, transformers, onnxruntime, with commas")] = "llama.cpp",
    quant: Annotated[str, typer.Option(help="llama.cpp: f16, q8_0, q5_1, q5_0, q4_1 or q4_0")] = "q8_0",
    prompt: Annotated[int, typer.Option(min=2, help="tokens that are read")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="tokens that are generated")] = 32,
) -> None:
    """Prefill, decode, first token, memory, bytes, and energy where the system tells it; all models take turns."""
    wanted = [name.strip() for name in runtimes.split(",")]
    check_used("llama.cpp" in wanted, "--quant", "llama.cpp among --runtimes")

    from legolm.export import bench as measure
    from legolm.export import checked_runtimes
    from legolm.report import print_speeds

    print_speeds(measure(models, checked_runtimes(wanted), quant, prompt, tokens))
