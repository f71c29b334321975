"""A round whose changes are only known as sums: five questions in the place of one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel

from legolm.adapter import Change, Flat, Layout, Tensors, adapter_keys, adapter_layout
from legolm.block import Coverage
from legolm.config import AggregateConfig, RunConfig
from legolm.errors import LegolmError
from legolm.federate.client import simulated_roster
from legolm.federate.server.dispatch import Dispatch, Order
from legolm.federate.server.members import Members
from legolm.federate.transport import Exchange
from legolm.federate.wire import (
    BOUNDS,
    MASKED,
    OPENED,
    SEALED,
    SHARES,
    SIGNATURES,
    Alike,
    ConfirmReply,
    ConfirmRequest,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SecureUpload,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    block_files,
    block_hash,
    block_id,
    block_key,
    counts,
    from_tensor,
    own_data,
    pack,
    reply_header,
    row_bounds,
    rows_hash,
    scale,
    to_tensor,
    told,
    unpack,
)
from legolm.finetune import trainer_of
from legolm.privacy import Opened, SecureServer, Session, Structure, grid_of, sent_hashes, withheld
from legolm.system import Progress
from legolm.trust import roster

SHARE_BYTES = 33
AGAIN_S = 10.0
"""Before devices are asked again for want of them."""


@dataclass(frozen=True)
class Summed:
    """What a round opened: a change for each client whose part is in it, as the scheme is to add them.

    Their sum is the clients' sum; each by itself is nobody's (`_changes`), and it is of the `entries` (bool by factor
    key) that were opened. `refused` says of the others why, `closed` is the share of the held entries that stayed
    closed, with the reasons. `asked`: clients were asked for shares that open it, and give them once a round.
    """

    changes: Mapping[str, Change]
    entries: Tensors
    refused: Mapping[str, str]
    closed: float
    reasons: Sequence[str]
    asked: bool = True


def session_of(config: RunConfig, run: str, number: int, attempt: int, frozen_side: bool) -> Session:
    """The secure sum of a round."""
    secure, apart = config.privacy.secure, config.federation.engine == "deployment"
    assert secure is not None
    return Session(
        run=run,
        round=number,
        attempt=attempt,
        k=secure.least,
        targets=config.lora.targets,
        rank=config.lora.rank,
        ranks=config.lora.ranks,
        frozen_side=frozen_side,
        weight=config.aggregate.weight,
        weight_cap=config.aggregate.weight_cap,
        dropouts=config.privacy.dp.dropouts if config.privacy.dp.level != "none" else None,
        rows=rows_hash(own_data(config, config.clients[0].id)) if apart else "",
    )


class SecureRound:
    """One attempt at a round's sum. `roster` has the clients' identities, `last` is the last aggregate's move, `files`
    gives the hash of those of a block."""

    def __init__(
        self,
        config: RunConfig,
        dispatch: Dispatch,
        members: Members,
        order: Order,
        session: Session,
        roster: Mapping[str, str],
        last: Tensors | None,
        exchange: Exchange,
        files: Callable[[Path], str],
    ) -> None:
        self._config, self._dispatch, self._order, self._exchange = config, dispatch, order, exchange
        self._files = files
        self._members, self._session, self._last = members.at(order.number), session, last
        structures = {id: Structure.of(self._members.trains[id], self._members.rank[id]) for id in order.clients}
        self._shape = self._members.llm.coverage.shape
        self._server = SecureServer(session, self._shape, structures, roster)
        self._refused: dict[str, str] = {}

    def run(self, least: int) -> Summed:
        """All five phases, up to the one after which nothing can be opened, as where fewer than `least` uploaded."""
        server, clients = self._server, list(self._order.clients)
        self._ask("keys", clients, self._keys_request, KeysReply)
        try:
            server.close_keys()
        except LegolmError as error:
            return self._nothing(str(error))
        cohort = server.cohort
        left = [id for id in clients if id in cohort.adverts and self._has_atoms(id, cohort.adverts)]
        self._ask("shares", left, self._shares_request, SharesReply)
        left = [id for id in left if id in server.there and self._has_atoms(id, server.there)]
        if not left:
            return self._nothing("secure sum: no entry has enough holders left")
        self._prepare(left)
        self._ask("train", left, self._train_request, MaskedReply)
        if len(server.survivors) < least:
            return self._nothing(f"secure sum: {len(server.survivors)} clients sent theirs, and {least} are asked for")
        if not cohort.opened(server.there, server.survivors, server.survivors):
            return self._nothing(f"secure sum: {len(server.survivors)} clients sent theirs, too few for any entry")
        self._ask("confirm", server.survivors, self._confirm_request, ConfirmReply)
        if not server.giving:
            return self._nothing(f"secure sum: {len(server.signatures)} clients signed who sent theirs, too few")
        self._ask("unmask", server.giving, self._unmask_request, UnmaskReply)
        opened, closed = server.finish(self._told, self._sent)
        return self._summed(opened, closed)

    # Asking

    def _ask(
        self,
        phase: str,
        clients: Sequence[str],
        content: Callable[[str], bytes],
        kind: type[BaseModel],
    ) -> None:
        """One question to each; who answers otherwise is out of this round."""
        order = replace(self._order, clients=list(clients))
        label = f"round {order.number}: {phase}"
        for one in self._dispatch.ask([order], content, self._exchange, label):
            try:
                if one.error:
                    raise LegolmError(one.error)
                take(self._server, one.client, one.content, kind)
            except LegolmError as error:
                self._refused[one.client] = str(error)

    def _sum(self, id: str) -> dict[str, object]:
        envelope = self._dispatch.envelope(self._order, id)
        return {name: envelope[name] for name in ("run", "client", "block")} | {"session": self._session}

    def _keys_request(self, id: str) -> bytes:
        trained, held = self._members.trains[id].layers, self._members.block[id].coverage.layers
        layers = None if trained == held else list(trained)
        return pack(KeysRequest(**self._dispatch.envelope(self._order, id), session=self._session, layers=layers), {})

    def _shares_request(self, id: str) -> bytes:
        server = self._server
        return pack(
            SharesRequest.model_validate(self._sum(id) | {"adverts": server.adverts, "structures": server.structures}),
            {},
        )

    def _prepare(self, clients: Sequence[str]) -> None:
        """What everyone is told alike: the bounds, and what was sent."""
        grid, config, scheme = self._server.cohort.grid, self._config, self._order.scheme
        trainer, far = trainer_of(config.train), config.train.learning_rate * config.train.steps
        held = {block.coverage.hash: block.coverage for block in self._members.block.values()}.values()
        moved = {key: far * max(trainer.moves(one, key) for one in held) for key in grid.layout.shapes}
        self._bounds = row_bounds(grid, self._last, len(self._server.there), moved)
        self._prepared = self._dispatch.prepared(self._order)
        whole = scheme.payload(Coverage.full(self._shape), self._session.rank)
        self._sent = torch.cat([whole[key].flatten() for key in grid.layout.shapes]).numpy()
        blocks = dict[str, str]()
        for id in clients:
            request, broadcast = self._prepared(id)
            if (key := block_key(request)) not in blocks:
                blocks[key] = block_hash(self._files(self._members.block[id].path), broadcast.hash)
        self._alike = Alike(atoms=sent_hashes(self._server.cohort, self._sent), blocks=blocks)
        self._told, self._noise = told(request, self._bounds, self._alike), request.settings.dp

    def _train_request(self, id: str) -> bytes:
        request, broadcast = self._prepared(id)
        if told(request, self._bounds, self._alike) != self._told:
            raise LegolmError(f"secure sum: {id} would be told to train otherwise than the others")
        inbox = self._server.inbox(id)
        secure = SecureUpload(
            session=self._session,
            there=self._server.there,
            senders=list(inbox),
            sizes=[len(one) for one in inbox.values()],
            alike=self._alike,
        )
        tensors = {BOUNDS: torch.from_numpy(self._bounds), SEALED: to_tensor(list(inbox.values()))}
        named = {f"secure.{name}": tensor for name, tensor in tensors.items()}
        return pack(request.model_copy(update={"secure": secure}), broadcast.content | named)

    def _confirm_request(self, id: str) -> bytes:
        return pack(ConfirmRequest.model_validate(self._sum(id) | {"survivors": self._server.survivors}), {})

    def _unmask_request(self, id: str) -> bytes:
        known = self._server.signatures
        header = UnmaskRequest.model_validate(self._sum(id) | {"signers": list(known)})
        return pack(header, {SIGNATURES: to_tensor(list(known.values()))})

    def _has_atoms(self, id: str, there: Collection[str]) -> bool:
        if self._server.cohort.atoms_of(id, there):
            return True
        self._refused[id] = f"secure sum: nothing that it holds has {self._session.k} holders in this round"
        return False

    # The sum

    def _summed(self, opened: Sequence[Opened], closed: Mapping[tuple[str, ...], str]) -> Summed:
        cohort = self._server.cohort
        total = sum(len(one.places) for one in cohort.all_atoms)
        shut = 1 - sum(len(one.atom.places) for one in opened) / total
        sizes = {one.holders: len(one.places) for one in cohort.atoms}
        reasons = [f"{sizes[holders]:,} entries of {len(holders)} clients: {why}" for holders, why in closed.items()]
        changes = self._changes(opened)
        for id in self._order.clients:
            if id not in changes:
                self._refused.setdefault(id, "secure sum: nothing of it was opened")
        refused = {id: reason for id, reason in self._refused.items() if id not in changes}
        return Summed(changes, self._entries(opened), refused, shut, reasons)

    def _entries(self, opened: Sequence[Opened]) -> Tensors:
        layout = self._server.cohort.grid.layout
        found = torch.zeros(layout.total, dtype=torch.bool)
        for one in opened:
            found[torch.from_numpy(one.atom.places)] = True
        return dict(Flat(found, layout))

    def _changes(self, opened: Sequence[Opened]) -> dict[str, Change]:
        """The sums, and what each client counts.

        A scheme that sums asks no more than Σ n Δ and who was there. So the first survivor of each atom gets all of
        that atom's sum, over its own weight, and the others nothing of it: whatever the scheme, the sum is the same.
        """
        server, cohort = self._server, self._server.cohort
        share = counts(self._session, server.adverts, server.there)
        flat: dict[str, np.ndarray] = {}
        for one in opened:
            step = scale(cohort, [one.atom], server.there, self._bounds, self._noise).step
            first = one.survivors[0]
            values = flat.setdefault(first, np.zeros(len(cohort.places(first)), dtype=np.float32))
            values[cohort.order(first, [one.atom])] = one.total * step.astype(np.float64) / share[first]
        found = sorted({id for one in opened for id in one.survivors})
        delta = {id: self._delta(id, values) for id, values in flat.items()}
        return {id: Change(delta.get(id, {}), {}, share[id], self._members.rank[id]) for id in found}

    def _delta(self, id: str, values: np.ndarray) -> Flat:
        keys = adapter_keys(self._members.trains[id], self._session.targets, trained=self._session.frozen_side)
        layout: Layout = adapter_layout(self._members.trains[id], keys, self._members.rank[id], self._session.ranks)
        return Flat(torch.from_numpy(values), layout)

    def _nothing(self, why: str) -> Summed:
        refused = {id: self._refused.get(id, why) for id in self._order.clients}
        return Summed({}, {}, refused, 1.0, [why], asked=False)


def take(server: SecureServer, id: str, content: bytes, kind: type[BaseModel]) -> None:
    """Read a client's answer, of this kind, into the sum. Raises `LegolmError` for what is none."""
    reply, tensors = unpack(content, kind, reply_header(kind))
    match reply:
        case KeysReply():
            server.advert(id, reply.advert)
        case SharesReply():
            parts = from_tensor(tensors.get(SHARES), reply.sizes)
            if len(reply.to) != len(parts):
                raise LegolmError("secure sum: shares for other clients than it names")
            server.shares(id, dict(zip(reply.to, parts, strict=True)))
        case MaskedReply():
            found, size = tensors.get(MASKED), server.cohort.bits // 8
            words = b"" if found is None else from_tensor(found, [found.numel()])[0]
            if len(words) % size:
                raise LegolmError(f"secure sum: {len(words)} bytes are no words of {size}")
            server.upload(id, np.frombuffer(words, dtype=f"<u{size}"), reply.seeds)
        case ConfirmReply():
            server.confirm(id, bytes.fromhex(reply.signature))
        case UnmaskReply():
            found = tensors.get(SHARES)
            count = 0 if found is None else found.numel() // SHARE_BYTES
            server.unmask(id, from_tensor(found, [SHARE_BYTES] * count))


class SecureRounds:
    """The rounds' sums of a run, whose clients' identities are in `roster`."""

    def __init__(
        self,
        config: RunConfig,
        run: str,
        members: Members,
        dispatch: Dispatch,
        roster: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self._config, self._run, self._members, self._dispatch = config, run, members, dispatch
        self._roster, self._progress = roster, progress
        apart = config.federation.engine == "deployment"
        self._files = cache(lambda folder: block_id(block_files(folder)) if apart else "")

    def round(self, order: Order, last: Tensors | None, exchange: Exchange) -> Summed:
        """One round; devices of their own are asked anew where nothing can be opened, until they gave shares for it."""
        federation, attempt = self._config.federation, 0
        least = min(federation.min_replies, len(order.clients))
        while True:
            session = session_of(self._config, self._run, order.number, attempt, order.scheme.frozen_side)
            one = SecureRound(
                self._config, self._dispatch, self._members, order, session, self._roster, last, exchange, self._files
            )
            summed = one.run(least)
            for reason in summed.reasons:
                self._progress.note(f"round {order.number}: stays closed: {reason}")
            # Who helped to open it gives nothing for it again: what came of it was lost with the server that asked.
            spent = any(OPENED in reason for reason in summed.refused.values())
            if summed.asked or spent or federation.engine != "deployment":
                return summed
            attempt += 1
            gone = "; ".join(f"{id}: {reason}" for id, reason in summed.refused.items())
            self._progress.note(f"round {order.number}: all are asked anew ({gone})")
            time.sleep(AGAIN_S)


def check_withheld(config: RunConfig, frozen_side: bool, rounds: Iterable[Sequence[tuple[Coverage, int]]]) -> float:
    """The largest share of entries that a round never sends, for too few of its clients (coverage, rank) hold them.

    Raises `LegolmError` above `privacy.secure.withheld_limit`.
    """
    secure = config.privacy.secure
    assert secure is not None
    known: dict[tuple[tuple[Structure, int], ...], float] = {}
    most = 0.0
    structures: dict[tuple[str, tuple[int, ...], int], Structure] = {}
    for number, clients in enumerate(rounds, 1):
        there = Counter[Structure]()
        for coverage, rank in clients:
            name = coverage.hash, coverage.layers, rank
            if name not in structures:
                structures[name] = Structure.of(coverage, rank)
            there[structures[name]] += 1
        key = tuple(sorted(there.items(), key=str))
        if key not in known:
            shape = clients[0][0].shape
            grid = grid_of(session_of(config, "plan", number, 0, frozen_side), shape)
            known[key] = withheld(grid, shape, there, secure.least)
        most = max(most, known[key])
        if most > secure.withheld_limit:
            raise LegolmError(
                f"privacy.secure.withheld_limit {secure.withheld_limit:g}: in round {number} {100 * most:.1f} % of the "
                f"entries have fewer than {secure.least} holders and would never be sent; give more clients the same "
                "blocks, or raise the limit"
            )
    return most


def moved(before: Tensors, after: Tensors, config: AggregateConfig) -> Tensors:
    """How far the last aggregate moved each factor, as a mean of what clients sent: without the server's own rate."""
    rate = config.eta if config.server_optimizer == "none" else 1.0
    return {key: (after[key] - before[key]) / rate for key in before if key.startswith("layers.")}


def roster_of(config: RunConfig, run: str) -> Mapping[str, str]:
    """The clients' public identities, hexadecimal. Raises `LegolmError` for a device without one."""
    ids = [client.id for client in config.clients]
    if config.federation.engine != "deployment":
        return simulated_roster(run, ids)
    home = Path(config.federation.superlink.home)
    known = roster(home)
    for id in ids:
        if id not in known:
            raise LegolmError(
                f"privacy.secure: device {id!r} has no identity in {home}; register its device.pub, as this version "
                "makes it, with legolm devices add"
            )
    return {id: known[id] for id in ids}
