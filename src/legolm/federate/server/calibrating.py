"""Private calibration: clients sum what pruning needs to know of their own text, and the sums are added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from legolm.errors import LegolmError
from legolm.federate.transport import Exchange, Request
from legolm.federate.wire import SUMS, CalibrateRequest, SumsReply, pack, plain, unpack
from legolm.models import Shape
from legolm.prune import Statistics
from legolm.system import Progress


def calibrate(
    request: CalibrateRequest, clients: Sequence[str], shape: Shape, exchange: Exchange, progress: Progress
) -> Statistics:
    """Ask each of `clients` with this request, and add their sums up in this order, whatever order they come in.

    One that is given up, or whose sums are not what was asked for, is named and left out. Raises `LegolmError` where
    nobody is left.
    """
    ready: dict[int, Statistics | None] = {}
    total: Statistics | None = None
    added = 0

    def requests() -> Iterator[Request]:
        for id in clients:
            yield Request(id, pack(request.model_copy(update={"client": id}), {}))

    with progress.stage("calibrate on clients' own text", len(clients)) as advance:
        for reply in exchange(requests()):
            if not added <= reply.index < len(clients) or reply.index in ready:
                continue  # one more of somebody
            try:
                if reply.error:
                    raise LegolmError(reply.error)
                ready[reply.index] = _read(reply.content, request, shape)
            except LegolmError as error:
                ready[reply.index] = None
                progress.note(f"client {clients[reply.index]}: blocks are cut without its text ({plain(error)})")
            while added in ready:
                found = ready.pop(added)
                if total is None:
                    total = found
                elif found is not None:
                    total.absorb(found)
                added += 1
            advance(1)
    if total is None:
        raise LegolmError("calibration.statistics: no client has sent any; the lines above say why")
    return total


def _read(content: bytes, request: CalibrateRequest, shape: Shape) -> Statistics:
    header, tensors = unpack(content, SumsReply)
    if header.tokens > request.samples * request.length or tensors.keys() != {SUMS}:
        raise LegolmError(
            f"its sums are of {header.tokens} tokens; {request.samples} x {request.length} were asked for"
        )
    try:
        return Statistics.unflat(tensors[SUMS], header.tokens, shape, request.base_fingerprint, request.needs)
    except ValueError as error:
        raise LegolmError(f"its sums do not fit: {error}") from None
