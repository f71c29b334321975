"""What a client is asked before blocks are cut, and the sums that it answers with (`prune.Statistics`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from legolm.config import Precision
from legolm.federate.wire.messages import Name
from legolm.system import derive_seed

SUMS = "sums"
"""Tensor of a reply: all sums, or with sketches the squares, in one dimension, float32."""
SKETCHES = "sketches"
"""Tensor of a reply: all sketches, in one dimension, bfloat16."""
MAX_SUMS_BYTES = 210_000_000
"""Of a client's sums: Flower's database was seen to take 201.5 MB in one message, and not to take 500."""


class CalibrateRequest(BaseModel):
    """Sum second moments over windows of your own training rows in the LLM, the `block`: `samples` of `length` tokens,
    or as many as there are, drawn by `seed`; with `sketch` send squares and sketches of so many columns.
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
    sketch: Annotated[int, Field(ge=1)] | None = None
    precision: Precision
    seed: int

    @model_validator(mode="after")
    def _full(self) -> CalibrateRequest:
        if self.sketch is not None and self.needs != "full":
            raise ValueError("a sketch is of all second moments")
        return self

    @property
    def sketch_seed(self) -> int:
        """Of the sketches' random sides: each client's are others, so that together they hold more."""
        return derive_seed(self.seed, "sketch", self.client)


class SumsReply(BaseModel):
    """Over how many tokens the tensor `sums`, and if asked for the tensor `sketches`, are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["sums"] = "sums"
    tokens: Annotated[int, Field(ge=1)]
