"""`legolm inspect`: what a block kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(block: Annotated[Path, typer.Argument(help="a block's folder")]) -> None:
    """What a block kept of the LLM: layers, KV groups, neurons, weights."""
    from legolm.block import read_block
    from legolm.report import print_coverage

    print_coverage(read_block(block))
