"""Requests and replies as bytes: one safetensors file each, its header a checked model in the metadata.

Nothing here trusts the other side: sizes are bounded, headers validated, no pickle. `accept` is the gate in front of
the aggregation: an update is refused, with the reason, before a byte of it is added.
"""

from __future__ import annotations

import json
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from legolm.coverage import Coverage, factor_shape, parse_key, tensors_hash
from legolm.types import LegolmError, Score, Tensors, Update

MAX_BYTES = 2 << 30
MAX_HEADER = 64 << 20


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_number: Literal[1] = 1
    run: str
    client: str
    block: str
    base_fingerprint: str
    coverage_hash: str
    rank: int
    scale: float


class TrainRequest(_Header):
    """Train the adapter that comes with it, the block's slice. `phase` is `round`, `local` or `personal`.

    `done` and `total` count the client's steps before this request and in the whole run: they set the learning rate.
    """

    kind: Literal["train"] = "train"
    phase: Literal["round", "local", "personal"]
    round: int
    steps: int
    done: int
    total: int
    seed: int


class EvaluateRequest(_Header):
    """Score the block, merged with the adapter that comes with it, on (client, split) pairs."""

    kind: Literal["evaluate"] = "evaluate"
    sets: list[tuple[str, Literal["validation", "test"]]]


class UpdateReply(_Header):
    """Header of an update; the tensors are the change of each factor."""

    kind: Literal["update"] = "update"
    round: int
    received_hash: str
    examples: int
    metrics: dict[str, float]


class ScoreReply(BaseModel):
    """Scores in the order of the request's sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["scores"] = "scores"
    scores: list[Score]


Header = TypeVar("Header", bound=BaseModel)


def pack(header: BaseModel, tensors: Tensors) -> bytes:
    """One safetensors file with the header in its metadata."""
    content: bytes = safetensors_save(tensors, metadata={"legolm": header.model_dump_json()})
    return content


def unpack(content: bytes, kind: type[Header]) -> tuple[Header, Tensors]:
    """The header as `kind` and the tensors. Raises `LegolmError` for anything broken, oversized or of another kind."""
    if len(content) > MAX_BYTES:
        raise LegolmError(f"message of {len(content)} bytes; at most {MAX_BYTES}")
    try:
        return kind.model_validate_json(_metadata(content)), safetensors_load(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise LegolmError(f"message header: {where}: {problem['msg']}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LegolmError(f"message is broken ({error})") from None


def kind_of(content: bytes) -> str:
    """The `kind` in a message's header."""
    try:
        return str(json.loads(_metadata(content))["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise LegolmError(f"message is broken ({error})") from None


def accept(content: bytes, request: TrainRequest, sent: Tensors, coverage: Coverage) -> Update:
    """Check a reply against what was asked and return its update; `coverage` is the client's block's.

    Raises `LegolmError` with the first mismatch of header, keys, shape, dtype or finiteness.
    """
    reply, delta = unpack(content, UpdateReply)
    expected: dict[str, object] = {
        field: getattr(request, field)
        for field in ("run", "round", "client", "block", "base_fingerprint", "coverage_hash", "rank", "scale")
    }
    expected["received_hash"] = tensors_hash(sent)
    for name, value in expected.items():
        if getattr(reply, name) != value:
            raise LegolmError(f"{name} is {getattr(reply, name)!r}; asked for {value!r}")
    if reply.examples < 1:
        raise LegolmError(f"examples is {reply.examples}; must be at least 1")
    check_factors(delta, sent, coverage, request.rank)
    return Update(
        run=reply.run,
        round=reply.round,
        client=reply.client,
        block=reply.block,
        base_fingerprint=reply.base_fingerprint,
        coverage_hash=reply.coverage_hash,
        received_hash=reply.received_hash,
        examples=reply.examples,
        rank=reply.rank,
        scale=reply.scale,
        delta=delta,
        metrics=reply.metrics,
    )


def check_factors(factors: Tensors, like: Tensors, coverage: Coverage, rank: int) -> None:
    """Raise `LegolmError` unless the factors have the keys of `like` and the block's shapes, float32 and finite."""
    missing, foreign = sorted(set(like) - set(factors)), sorted(set(factors) - set(like))
    if missing or foreign:
        raise LegolmError(f"{missing[0]} is missing" if missing else f"{foreign[0]} was not asked for")
    for key, tensor in factors.items():
        _, _, side = parse_key(key)
        # A module may have a rank of its own, below the client's.
        own = tensor.shape[0 if side == "A" else -1] if tensor.dim() == 2 else rank
        wanted = factor_shape(coverage, key, max(1, min(rank, own)))
        if tuple(tensor.shape) != wanted or tensor.shape != like[key].shape:
            raise LegolmError(f"{key} has shape {tuple(tensor.shape)}; the block's is {wanted}")
        if tensor.dtype != torch.float32:
            raise LegolmError(f"{key} is {tensor.dtype}; must be float32")
        if not bool(tensor.isfinite().all()):
            raise LegolmError(f"{key} is not finite")


def _metadata(content: bytes) -> str:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MAX_HEADER, len(content) - 8):
        raise ValueError("not a safetensors message")
    return str(json.loads(content[8 : 8 + size])["__metadata__"]["legolm"])
