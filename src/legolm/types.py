"""The words of the project as frozen dataclasses: examples, coverage, blocks, updates, the global adapter.

Data flows `RunConfig -> [Block] -> Assignment -> [Update] -> GlobalAdapter -> updated LLM and blocks`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from legolm.coverage import Coverage

Tensors = dict[str, "Tensor"]
"""Adapter factors keyed `layers.{LLM layer}.{module}.{A|B}`: A is (rank, in), B is (out, rank), float32."""


class LegolmError(Exception):
    """Bad input: one line that names the field, the value and the fix. The command exits with code 2."""


def nearest(word: str, known: Collection[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" did you mean `{close[0]}`?" if close else f" known: {', '.join(known)}"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation whose last message, the assistant's, is the answer to learn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class ClientData:
    """What one client holds. It never leaves the client."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


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


@dataclass(frozen=True)
class Update:
    """What a client returns after training: the change `delta` of each factor it received, in its block's slice.

    `examples` is HeteAgg's weight n_k: the number of examples the client trained on. `received` is what
    the change is from: the factors after the codec, with those that the client made itself.
    """

    run: str
    round: int
    client: str
    block: str
    base_fingerprint: str
    coverage_hash: str
    received_hash: str
    examples: float
    rank: int
    scale: float
    delta: Mapping[str, Tensor]
    received: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalAdapter:
    """The aggregated adapter in the LLM's coordinates.

    `weight` has the keys and shapes of `factors` and holds, entry by entry, the total weight of the clients that
    ever trained it, so that "nobody trained this" (0) and "averaged to zero" differ.
    """

    factors: Tensors
    weight: Tensors
    rank: int
    scale: float


@dataclass(frozen=True)
class Score:
    """Answers on one set of examples: mean loss per answer token (nats) and the share answered exactly."""

    loss: float
    exact_match: float
    tokens: int
    examples: int
