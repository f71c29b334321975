"""Requests and replies as bytes: one safetensors file each, its header a checked model in the metadata.

Nothing here trusts the other side: sizes, counts and names are bounded before anything is made of them, headers are
validated, and nothing is pickled.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator
from safetensors.torch import save as safetensors_save

from legolm.adapter import Tensors
from legolm.config import Codec, DpConfig, Precision, TrainConfig
from legolm.errors import PublicError, printable
from legolm.privacy import Session
from legolm.runs import Score

# Tensors of a message are views of its bytes; nobody writes to them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

MAX_BYTES = 2 << 30
MAX_HEADER = 16 << 20
"""Of a request, which may ask for thousands of scores; a reply's bound is its own."""
MAX_REPLY_HEADER = 64 << 10
MAX_TENSORS, MAX_DIMENSIONS = 16, 4
MAX_EXAMPLES = 10**9
MAX_PERIODS = 100_000
"""Folded in one message: as many as a run has rounds."""
MAX_METRIC = 1e15
"""Of what a client says of its training: sums of it must have an end."""
MAX_SAID = 300
"""Signs of an error about a message, which may quote it."""
Name = Annotated[str, Field(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Of a run, client, block, hash or metric: what reaches records, reports and terminals. No control codes."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}


class Envelope(BaseModel):
    """Who a message is for or from: run, client, block, and what identifies that block. A scheme never sees it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_number: Literal[2] = 2
    run: Name
    client: Name
    block: Name
    base_fingerprint: Name
    coverage_hash: Name
    rank: Annotated[int, Field(ge=1)]
    scale: float


class TrainSettings(BaseModel):
    """What training needs beside tensors, so that a client needs no config of the run.

    With `derived_seed` the client makes factors itself: those of the side that does not train if `frozen_side`, else
    all, and its own ones (`fresh`); they are slices of an adapter of rank `run_rank` (`ranks`: of single modules) on
    `targets`. What trains comes along if `sent`, and comes back, of `layers` (LLM layers) only if they are given.
    If `whitened` the frozen ones that read the hidden state are in the block's folder (`adapter.load_frozen`).
    `fold.` tensors, of rank `fold_rank`, change its base from now on; with `fold_seeds` they are of the sides that
    trained, and the client makes the frozen ones. The reply comes in this `codec`, with the `keep` share of its
    entries. `dp` is the noise that the client adds itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    targets: list[str] | None
    run_rank: int
    ranks: dict[str, int]
    layers: list[int] | None = None
    dropout: float
    train: TrainConfig
    precision: Precision
    frozen_side: bool
    derived_seed: int | None
    whitened: bool = False
    sent: bool = True
    fold_rank: int = 0
    fold_seeds: Annotated[list[int], Field(max_length=MAX_PERIODS)] = []
    proximal: float
    codec: Codec
    keep: float
    error_feedback: bool
    dp: DpConfig | None = None

    @property
    def fresh(self) -> bool:
        """Whether each client makes its whole adapter itself: nothing of it is sent."""
        return self.derived_seed is not None and not self.frozen_side


Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Alike(BaseModel):
    """Hashes of all that the clients of a sum train from: each checks what it got, and all have the same ones.

    `atoms` are of what is sent on each atom, `blocks` by name and rank of what comes with a block (`block_hash`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    atoms: Annotated[list[Hash], Field(max_length=100_000)]
    blocks: dict[str, Hash]


class SecureUpload(BaseModel):
    """Send the change masked, for the sum of those who are `there`; `senders` sealed the parts of the tensor `sealed`,
    of these bytes each, for this client. The tensor `bounds` has the bound of each rank row, float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    session: Session
    there: list[Name]
    senders: list[Name]
    sizes: list[int]
    alike: Alike

    @model_validator(mode="after")
    def _one_size_each(self) -> Self:
        if len(self.senders) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} sizes of what {len(self.senders)} senders sealed")
        return self


class TrainRequest(Envelope):
    """Train the adapter that comes with it, the block's slice. `phase` is `round`, `local` or `personal`.

    `done` and `total` count the client's steps before this request and in the whole run: they set the learning rate.
    `parts` are the steps of each training, where these are several in one.
    `accepted` is the last round whose update of this client was added: the client's own state goes on from there.
    With `secure` the change comes back masked; its tensors stand under `secure.`.
    """

    kind: Literal["train"] = "train"
    phase: Literal["round", "local", "personal"]
    round: int
    steps: int
    done: int
    total: int
    parts: list[Annotated[int, Field(ge=1)]] = []
    seed: int
    accepted: int = 0
    settings: TrainSettings
    secure: SecureUpload | None = None


class Otherwise(BaseModel):
    """Another adapter, its tensors under `otherwise.`, for questions that are not like the client's own ones.

    They are told from so many public `prompts`, whose grams and counts are the tensor `otherwise.seen`; it may get the
    share `away` of the own ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: Annotated[int, Field(ge=1)]
    ranks: dict[str, int]
    prompts: Annotated[int, Field(ge=1, le=MAX_EXAMPLES)]
    away: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class EvaluateRequest(Envelope):
    """Score the block, merged with the adapter that comes with it, on (client, split) pairs.

    With `otherwise` each question is answered with the adapter that fits it. Its factors are on `targets`, `ranks`
    those of single modules. Examples are cut to `max_length` tokens, or refused.
    """

    kind: Literal["evaluate"] = "evaluate"
    sets: list[tuple[str, Literal["validation", "test"]]]
    targets: list[str] | None
    ranks: dict[str, int]
    max_length: int
    long_examples: Literal["truncate", "refuse"]
    precision: Precision
    batch_size: int
    otherwise: Otherwise | None = None


Metric = Annotated[float, Field(ge=-MAX_METRIC, le=MAX_METRIC, allow_inf_nan=False)]


class UpdateReply(Envelope):
    """Header of an update; the tensors are the change of each factor. `state` is the hash of what the client keeps."""

    kind: Literal["update"] = "update"
    round: int
    received_hash: Name
    examples: Annotated[int, Field(ge=1, le=MAX_EXAMPLES)]
    state: Name = ""
    metrics: Annotated[dict[Name, Metric], Field(max_length=64)]

    @field_serializer("metrics")
    def _fixed_width(self, metrics: dict[str, float]) -> dict[str, str]:
        # A clock's digits must not change how many bytes a run sends.
        return {name: f"{value:+.16e}" for name, value in metrics.items()}


class ScoreReply(BaseModel):
    """Scores in the order of the request's sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["scores"] = "scores"
    scores: list[Score]


REPLIED = ("run", "round", "client", "block", "base_fingerprint", "coverage_hash", "rank", "scale")
"""Fields of a request that come back in the reply."""
Header = TypeVar("Header", bound=BaseModel)


def pack(header: BaseModel, tensors: Tensors) -> bytes:
    """One safetensors file with the header in its metadata."""
    content: bytes = safetensors_save(tensors, metadata={"legolm": header.model_dump_json()})
    return content


def unpack(content: bytes, kind: type[Header], most: int = MAX_HEADER) -> tuple[Header, Tensors]:
    """The header as `kind` and the tensors. Raises `LegolmError` for anything broken, oversized or of another kind.

    `most` are bytes of the header.
    """
    if len(content) > MAX_BYTES:
        raise PublicError(f"message of {len(content)} bytes; at most {MAX_BYTES}")
    try:
        metadata, tensors = _parse(content, most)
        return kind.model_validate_json(metadata), tensors
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise PublicError(f"message header: {where}: {problem['msg']}"[:MAX_SAID]) from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise PublicError(f"message is broken ({plain(error)})") from None


def kind_of(content: bytes) -> str:
    """The `kind` in a message's header."""
    try:
        return str(json.loads(_header(content, MAX_HEADER)["__metadata__"]["legolm"])["kind"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PublicError(f"message is broken ({plain(error)})") from None


def plain(said: object) -> str:
    """What an error, or a client, says: short and without control codes, as it may quote or be anything."""
    return printable(str(said)[:MAX_SAID])


def _header(content: bytes, most: int) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("not a safetensors message")
    if size > most:
        raise ValueError(f"its header has {size} bytes; at most {most}")
    header = json.loads(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("not a safetensors message")
    return header


def _parse(content: bytes, most: int) -> tuple[str, Tensors]:
    """A safetensors message's metadata and tensors, as views of the message: the library copies each tensor twice."""
    header = _header(content, most)
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = header.pop("__metadata__")["legolm"]
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors; at most {MAX_TENSORS}")
    tensors: Tensors = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sizes = [*shape, begin, end]
        # Types and bounds before any arithmetic: a product of texts or of huge numbers takes all memory or time.
        whole = len(sizes) <= MAX_DIMENSIONS + 2 and all(type(n) is int and 0 <= n <= len(content) for n in sizes)
        if not whole or end - begin != math.prod(shape) * dtype.itemsize or (start + begin) % dtype.itemsize:
            raise ValueError(f"{name[:64]}: its size does not fit")
        count = math.prod(shape)
        if start + end > len(content):
            raise ValueError(f"{name[:64]}: its size does not fit")
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin) if count else torch.zeros(0)
        tensors[name] = flat.view(shape)
    return str(metadata), tensors
