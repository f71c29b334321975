"""A block: one small model cut from the LLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from legolm.block.coverage import Coverage


@dataclass(frozen=True)
class Block:
    """One small model cut from the LLM: a Hugging Face checkpoint at `path` plus its manifest.

    The LLM itself is the block named `llm` with full coverage, so that one code path serves both.
    `parameters` counts the stored parameters (tied ones once); `sparsity` is the removed share of the
    decoder's linear weights, structured or not.
    """

    name: str
    path: Path
    method: str
    coverage: Coverage
    base_fingerprint: str
    parameters: int
    sparsity: float
    file_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)
