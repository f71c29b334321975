"""The messages of a secure sum: keys, shares, the masked update in the place of a plain one, survivors, unmasking.

What all clients of a sum have to be told alike is `told`: its hash is in their masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from legolm.aggregate import capped
from legolm.config import DpConfig
from legolm.errors import PublicError
from legolm.federate.wire.messages import MAX_REPLY_HEADER, Alike, Envelope, Hash, Name, TrainRequest
from legolm.privacy import (
    Advert,
    Atom,
    Cohort,
    Grid,
    Scale,
    Session,
    Structure,
    bounds,
    deviation,
    noisy,
    quantum_range,
)

MAX_HEADER = 4 << 20
"""Bytes of a reply's header that names other clients."""
BOUNDS, SEALED, SHARES, MASKED, SIGNATURES = "bounds", "sealed", "shares", "masked", "signatures"
OPENED = "has opened round"
"""What a client says of a sum that it gives nothing for any more."""
Names = Annotated[list[Name], Field(max_length=10_000)]


class KeysRequest(Envelope):
    """Begin a sum of the LLM layers `layers` (None: all of the block): make keys, and sign them."""

    kind: Literal["keys"] = "keys"
    session: Session
    layers: list[int] | None


class KeysReply(BaseModel):
    """The keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["keys"] = "keys"
    advert: Advert


class SumRequest(BaseModel):
    """A later phase of a sum; whose, and of which block."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_number: Literal[2] = 2
    run: Name
    client: Name
    block: Name
    session: Session


class SharesRequest(SumRequest):
    """Share your secrets with the others; `structures` is what they hold, by hash."""

    kind: Literal["shares"] = "shares"
    adverts: list[Advert]
    structures: dict[Hash, Structure]


class SharesReply(BaseModel):
    """For whom each part of the tensor is, and its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["shares"] = "shares"
    to: Names
    sizes: Annotated[list[int], Field(max_length=10_000)]


class MaskedReply(BaseModel):
    """Header of a masked update; `seeds` are hashes of the atoms' seeds, and the tensor is words as bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["masked"] = "masked"
    seeds: Annotated[list[Hash], Field(max_length=100_000)]


class ConfirmRequest(SumRequest):
    """Sign that these have sent their sums."""

    kind: Literal["confirm"] = "confirm"
    survivors: Names


class ConfirmReply(BaseModel):
    """The signature."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["confirm"] = "confirm"
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class UnmaskRequest(SumRequest):
    """Give your shares: these have signed, and the tensor has their signatures."""

    kind: Literal["unmask"] = "unmask"
    signers: Names


class UnmaskReply(BaseModel):
    """The tensor has the shares, a row each."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["unmask"] = "unmask"


REPLY_HEADERS: Mapping[type[BaseModel], int] = {SharesReply: MAX_HEADER, MaskedReply: 8 << 20}
"""Bytes of a reply's header, at most, where it is not `MAX_REPLY_HEADER`."""


def reply_header(kind: type[BaseModel]) -> int:
    """Bytes of such a reply's header, at most."""
    return REPLY_HEADERS.get(kind, MAX_REPLY_HEADER)


def to_tensor(parts: Sequence[bytes]) -> Tensor:
    """Parts one after the other, uint8."""
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) if any(parts) else torch.zeros(0).byte()


def from_tensor(tensor: Tensor | None, sizes: Sequence[int]) -> list[bytes]:
    """The parts again. Raises `LegolmError` for a tensor that has other bytes."""
    if tensor is None or tensor.dtype != torch.uint8 or any(size < 0 for size in sizes) or tensor.numel() != sum(sizes):
        raise PublicError("secure sum: a message's bytes are not as many as its header says")
    content, found, at = tensor.flatten().numpy().tobytes(), [], 0
    for size in sizes:
        found.append(content[at : at + size])
        at += size
    return found


def told(request: TrainRequest, row_bounds: np.ndarray, alike: Alike) -> bytes:
    """What the server must tell every client of a sum alike: how to train, from which seeds, in which steps, from what.

    Not what is a client's own: its block, its randomness, the memory that it may take. Of the adapter's entries the
    hashes are in the masks anyway (`SecureClient.opening`).
    """
    own = {"client", "block", "coverage_hash", "rank", "seed", "accepted", "secure", "settings"}
    settings = request.settings
    train = settings.train.model_copy(update={"micro_batch_tokens": 1, "gradient_checkpointing": False})
    common = settings.model_copy(update={"train": train, "layers": None})
    texts = request.model_dump_json(exclude=own), common.model_dump_json(), alike.model_dump_json(exclude={"atoms"})
    digest = hashlib.sha256("".join(texts).encode())
    digest.update(np.ascontiguousarray(row_bounds, dtype="<f4").data)
    return digest.digest()


def block_key(request: TrainRequest) -> str:
    """By which its block stands in `Alike.blocks`."""
    return f"{request.block} {request.rank}"


def block_hash(files: str, content: str) -> str:
    """Of all that comes with a block: of the hash of its files (empty in a simulation) and that of the tensors."""
    return hashlib.sha256(f"{files} {content}".encode()).hexdigest()


def counts(session: Session, adverts: Collection[Advert], there: Collection[str]) -> dict[str, float]:
    """What each client that sent shares counts, the most 1: by what all signed, so that everyone knows it."""
    examples = {one.client: float(one.examples) for one in adverts if one.client in there}
    found = capped(examples, session.weight_cap) if session.weight == "capped" else examples
    most = max(found.values())
    return {id: count / most for id, count in found.items()}


def scale(
    cohort: Cohort, chosen: Sequence[Atom], there: Collection[str], row_bounds: np.ndarray, dp: DpConfig | None
) -> Scale:
    """Of each entry of these atoms, whose holders among `there` are to send them: from the bound of its rank row.

    With `dp`, of noise distributed, each adds its part, and those that must arrive are enough (`Session.parts`): by
    what all signed, not by what the server says. Raises `LegolmError` for noise that no number holds.
    """
    counts = [len(set(there).intersection(one.holders)) for one in chosen]
    sizes = [len(one.places) for one in chosen]
    most = np.repeat(np.array([quantum_range(count, cohort.bits) for count in counts], dtype=np.float32), sizes)
    bound = row_bounds[cohort.grid.rows[np.concatenate([one.places for one in chosen])]]
    if dp is None:
        return Scale(bound / most, most)
    parts = np.repeat([cohort.session.parts(count) for count in counts], sizes)
    limit = np.minimum(bound.astype(np.float64), dp.clip)
    found = noisy(limit, most, np.repeat(counts, sizes), deviation(dp) / np.sqrt(parts))
    if not np.isfinite(found.step).all():
        raise PublicError(f"privacy.dp: noise of deviation {deviation(dp):.3g} is more than a number holds")
    return found


def row_bounds(grid: Grid, last: Mapping[str, Tensor] | None, holders: int, moved: Mapping[str, float]) -> np.ndarray:
    """The bound of each rank row of all factors, from the last aggregate's move `last` of them, if there is one.

    `moved` is how far training can move an entry of each factor.
    """
    found = np.zeros(grid.row_count, dtype=np.float32)
    for number, key in enumerate(grid.layout.shapes if last is not None else ()):
        assert last is not None
        largest = last[key].abs().amax(1 if key.endswith(".A") else 0).numpy()
        found[number * grid.rank : number * grid.rank + len(largest)] = largest
    return bounds(found, holders, np.repeat([moved[key] for key in grid.layout.shapes], grid.rank))
