"""Blocks for devices that say themselves what they can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from legolm.errors import LegolmError
from legolm.federate.transport import Exchange, Request
from legolm.federate.wire import DeviceReply, Offer, OfferRequest, largest, pack, plain, unpack
from legolm.runs import Placed
from legolm.system import Progress


def place(request: OfferRequest, clients: Sequence[str], exchange: Exchange, progress: Progress) -> dict[str, Placed]:
    """Ask each of `clients` with this request, and give it the largest block that fits, or none.

    One that is given up, or answers nonsense, gets the smallest: it may come later, and what it has nobody knows.
    Raises `LegolmError` where no device has room for any block.
    """
    found: dict[str, Placed] = {}

    def requests() -> Iterator[Request]:
        for id in clients:
            yield Request(id, pack(request.model_copy(update={"client": id}), {}))

    with progress.stage("blocks for devices", len(clients)) as advance:
        for reply in exchange(requests()):
            id = clients[reply.index]
            try:
                if reply.error:
                    raise LegolmError(reply.error)
                device = unpack(reply.content, DeviceReply)[0]
            except LegolmError as error:
                smallest = min(request.offers, key=lambda one: one.parameters).name
                found[id] = Placed(block=smallest, reason=plain(error))
                progress.note(f"device {id}: did not say what it holds ({plain(error)}); it gets block {smallest!r}")
            else:
                found[id] = _of(device, largest(request, device))
                progress.note(f"device {id}: {_said(found[id])}")
            advance(1)
    if all(one.block is None for one in found.values()):
        said = "; ".join(f"{id}: {found[id].reason}" for id in clients if id in found)
        raise LegolmError(f"clients: no device has room for any block ({said})")
    return found


def _of(device: DeviceReply, block: Offer | str) -> Placed:
    memory, disk = device.memory / 1e6, device.disk / 1e6
    if isinstance(block, str):
        return Placed(block=None, reason=block, memory_mb=memory, disk_mb=disk)
    rate = device.speed * block.tokens / block.operations
    return Placed(block=block.name, memory_mb=memory, disk_mb=disk, tokens_per_second=rate)


def _said(one: Placed) -> str:
    if one.block is None:
        return f"takes no part: {one.reason}"
    rate = f"at most {one.tokens_per_second:,.0f} tokens a second"
    return f"block {one.block!r} ({one.memory_mb:,.0f} MB of memory, {rate})"
