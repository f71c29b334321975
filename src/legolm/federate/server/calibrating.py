"""Private calibration: clients sum what pruning needs to know of their own text, and the sums are added up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from legolm.block import write_llm
from legolm.config import CLIENTS, RunConfig
from legolm.errors import LegolmError
from legolm.federate.server.members import LLM
from legolm.federate.transport import Exchange, Reply, Request
from legolm.federate.wire import SKETCHES, SUMS, CalibrateRequest, SumsReply, pack, plain, unpack
from legolm.models import Shape, choose_precision, load_config, load_tokenizer, shape_of
from legolm.prune import Statistics, clients_needs, clients_sketch, save_statistics
from legolm.runs import Identity, RunDir, Traffic, Traffics, dump_sealed
from legolm.system import Progress, atomic_folder, atomic_write


def asks_clients(folder: RunDir, config: RunConfig) -> bool:
    """Whether blocks are still to be cut by sums that the clients have not been asked for."""
    left = [spec for spec in config.cuts if not folder.block(spec.name).exists()]
    return clients_needs(left) != "nothing" and not folder.sums.exists()


def calibrate(
    folder: RunDir,
    config: RunConfig,
    identity: Identity,
    base: Path,
    block_of: Mapping[str, str],
    exchange: Exchange,
    progress: Progress,
) -> None:
    """Ask those who are there from the first round on, and keep their sums in the run. Devices get the LLM for it.

    With `federation.regmean` also those of all who hold one block, by themselves.
    """
    asking = next(spec.calibration for spec in config.cuts if spec.calibration.statistics == CLIENTS)
    needs = clients_needs(config.cuts)
    assert needs != "nothing"
    shape = shape_of(load_config(base))
    request = CalibrateRequest(
        run=identity.run,
        client="",
        block=LLM,
        base_fingerprint=identity.base_fingerprint,
        samples=asking.samples,
        length=asking.length,
        needs=needs,
        sketch=clients_sketch(config.cuts, shape),
        precision=choose_precision(config.precision, config.device),
        seed=config.seed,
    )
    lent = folder.block(LLM)
    if config.federation.engine == "deployment" and not lent.exists():
        with atomic_folder(lent) as partial:
            write_llm(base, identity.base_fingerprint, load_tokenizer(base, config.data), partial)
    apart = config.federation.regmean
    shutil.rmtree(folder.block_sums("").parent, ignore_errors=True)  # of an earlier try
    there = {client.id: block_of[client.id] if apart else "" for client in config.clients if client.there(1)}
    sent: dict[str, Traffic] = {}
    found = summed(request, there, shape, exchange, progress, sent)
    shutil.rmtree(lent, ignore_errors=True)
    atomic_write(folder.sums_traffic, dump_sealed(Traffics(bytes=sent)))
    for name, one in found.items():
        if apart:
            save_statistics(one, folder.block_sums(name))
    total, *others = found.values()
    for one in others:
        total.absorb(one)
    save_statistics(total, folder.sums)


def summed(
    request: CalibrateRequest,
    clients: Mapping[str, str],
    shape: Shape,
    exchange: Exchange,
    progress: Progress,
    sent: dict[str, Traffic],
) -> dict[str, Statistics]:
    """Ask each of `clients` with this request, and add up the sums of each of the groups that they are said to be in.

    They are added in the clients' order, whatever order they come in.

    Who is before his turn waits as the message that he sent: sketches become square matrices of all layers.
    The bytes of each one's messages are added to `sent`. One that is given up, or whose sums are not what was asked
    for, is named and left out. Raises `LegolmError` where nobody is left.
    """
    ready: dict[int, Reply] = {}
    found: dict[str, Statistics] = {}
    order, added = list(clients), 0

    def of(id: str) -> CalibrateRequest:
        return request.model_copy(update={"client": id})

    def requests() -> Iterator[Request]:
        for id in clients:
            content = pack(of(id), {})
            sent[id] = Traffic(up=0, down=len(content))
            yield Request(id, content)

    def add(id: str, reply: Reply) -> None:
        try:
            if reply.error:
                raise LegolmError(reply.error)
            own = read_sums(reply.content, of(id), shape)
            if (group := clients[id]) in found:
                found[group].absorb(own)
            else:
                found[group] = own
        except LegolmError as error:
            progress.note(f"client {id}: blocks are cut without its text ({plain(error)})")

    with progress.stage("calibrate on clients' own text", len(clients)) as advance:
        for reply in exchange(requests()):
            if not added <= reply.index < len(order) or reply.index in ready:
                continue  # one more of somebody
            id = order[reply.index]
            sent[id] = sent[id].model_copy(update={"up": len(reply.content)})
            ready[reply.index] = reply
            while added in ready:
                add(order[added], ready.pop(added))
                added += 1
            advance(1)
        for index in range(added, len(order)):
            add(order[index], ready.pop(index, Reply(index, error="no reply came")))
    if not found:
        raise LegolmError("calibration.statistics: no client has sent any; the lines above say why")
    return found


def read_sums(content: bytes, request: CalibrateRequest, shape: Shape) -> Statistics:
    """A client's answer. Raises `LegolmError` for what was not asked for."""
    header, tensors = unpack(content, SumsReply)
    wanted = {SUMS} if request.sketch is None else {SUMS, SKETCHES}
    if header.tokens > request.samples * request.length or tensors.keys() != wanted:
        raise LegolmError(
            f"its sums are of {header.tokens} tokens; {request.samples} x {request.length} were asked for"
        )
    base, tokens = request.base_fingerprint, header.tokens
    try:
        if request.sketch is None:
            return Statistics.unflat(tensors[SUMS], tokens, shape, base, request.needs)
        squares, sketches = tensors[SUMS], tensors[SKETCHES]
        return Statistics.restored(squares, sketches, tokens, shape, base, request.sketch, request.sketch_seed)
    except ValueError as error:
        raise LegolmError(f"its sums do not fit: {error}") from None
