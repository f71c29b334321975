"""What a client is asked before blocks are cut, and the sums that it answers with (`prune.Statistics`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from legolm.config import Precision
from legolm.federate.wire.messages import Name

SUMS = "sums"
"""Tensor of a reply: all sums, in one dimension, float32."""
MAX_SUMS_BYTES = 210_000_000
"""Of a client's sums: Flower's database was seen to take 201.5 MB in one message, and not to take 500."""


class CalibrateRequest(BaseModel):
    """Sum second moments over windows of your own training rows in the LLM, the `block`: `samples` of `length` tokens,
    or as many as there are, drawn by `seed`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_number: Literal[2] = 2
    kind: Literal["calibrate"] = "calibrate"
    run: Name
    client: Name
    block: Name
    base_fingerprint: Name
    samples: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]
    needs: Literal["diagonal", "full"]
    precision: Precision
    seed: int


class SumsReply(BaseModel):
    """Over how many tokens the tensor `sums` is."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["sums"] = "sums"
    tokens: Annotated[int, Field(ge=1)]
