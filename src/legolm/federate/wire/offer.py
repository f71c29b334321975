"""What a device is asked before it has a block, what it says of itself, and the largest block that fits that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from legolm.config import Precision
from legolm.federate.wire.messages import Name

MAX_OFFERS, MAX_HELD = 1000, 10_000
Amount = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]
BlockId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Offer(_Header):
    """A block and what a device needs for it.

    `bytes` of files; `memory` (bytes) to train it with the leanest settings; `operations` of a round's matrix products,
    `tokens` of a round, at most.
    """

    name: Name
    id: BlockId
    parameters: Count
    bytes: Count
    memory: Count
    operations: Amount
    tokens: Count


class OfferRequest(_Header):
    """Say what you are: these are the run's blocks, and a round takes `deadline_s` seconds at most, if it is given."""

    schema_number: Literal[2] = 2
    kind: Literal["offer"] = "offer"
    run: Name
    client: Name
    precision: Precision
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    offers: Annotated[list[Offer], Field(min_length=1, max_length=MAX_OFFERS)]


class DeviceReply(_Header):
    """What a device is: bytes of memory that training may take and of free disk, matrix products' operations a second
    as measured, and ids of blocks that it holds (`Welcome.block_id`).
    """

    kind: Literal["device"] = "device"
    memory: Amount
    disk: Amount
    speed: Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
    held: Annotated[list[BlockId], Field(max_length=MAX_HELD)]


def largest(request: OfferRequest, device: DeviceReply) -> Offer | str:
    """The block with the most parameters that fits the device, or why none does. Both sides ask this."""
    lacks = {one.name: _lacking(one, request.deadline_s, device) for one in request.offers}
    for one in _by_size(request.offers):
        if not lacks[one.name]:
            return one
    smallest = _by_size(request.offers)[-1].name
    return (
        f"no block fits it: the smallest, {smallest!r}, {lacks[smallest]}; give it more, or add a smaller block to the "
        "config"
    )


def _by_size(offers: Sequence[Offer]) -> list[Offer]:
    return sorted(offers, key=lambda one: -one.parameters)


def _lacking(offer: Offer, deadline_s: float | None, device: DeviceReply) -> str:
    if offer.memory > device.memory:
        return f"needs {_mb(offer.memory)} of memory to train, and it has {_mb(device.memory)} (--memory-mb)"
    if offer.bytes > device.disk and offer.id not in device.held:
        return f"needs {_mb(offer.bytes)} of disk, and {_mb(device.disk)} are free (--home)"
    if deadline_s is not None and offer.operations / device.speed > deadline_s:
        return (
            f"takes {offer.operations / device.speed:,.0f} s a round at its speed, and federation.deadline_s is "
            f"{deadline_s:g}"
        )
    return ""


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
