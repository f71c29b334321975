"""`legolm inspect`: what a block kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(block: Annotated[str, typer.Argument(help="a block's folder, or RUN:CLIENT")]) -> None:
    """What a block kept of the LLM: layers, KV groups, neurons, weights."""
    from legolm.block import read_block
    from legolm.models import find_model
    from legolm.report import print_coverage

    folder = Path(block)
    print_coverage(read_block(folder if folder.exists() or ":" not in block else find_model(block)))
