"""Ask clients to train and to score, and check what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from legolm.adapter import (
    Layout,
    Tensors,
    Update,
    adapter_keys,
    adapter_layout,
    initial_factors,
    slice_factors,
    tensors_hash,
    with_prefix,
)
from legolm.aggregate import Scheme
from legolm.block import Block, Coverage
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.transport import Exchange, Request
from legolm.federate.wire import codec
from legolm.federate.wire import messages as wire
from legolm.runs import Score
from legolm.system import Progress, derive_seed

Phase = Literal["round", "local", "personal"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Order:
    """Who trains, from what, in which phase; `accepted` is each client's last round whose update was added."""

    clients: Sequence[str]
    scheme: Scheme
    phase: Phase
    number: int
    accepted: Mapping[str, int]


@dataclass(frozen=True)
class Job:
    """Score one block with one adapter, on behalf of a client, on (client, split) pairs."""

    client: str
    block: Block
    factors: Tensors
    sets: tuple[tuple[str, Split], ...]


@dataclass(frozen=True)
class Trained:
    """What came back from one client: its update, or why there is none; the reply; bytes of the request."""

    client: str
    update: Update | None
    reason: str
    bytes_down: int
    reply: bytes

    @property
    def bytes_up(self) -> int:
        """Bytes of the reply."""
        return len(self.reply)


class Dispatch:
    """Speaks to the clients of one run; `block` and `rank` are each client's."""

    def __init__(
        self, config: RunConfig, run: str, block: Mapping[str, Block], rank: Mapping[str, int], progress: Progress
    ) -> None:
        self._config, self._run = config, run
        self._block, self._rank = block, rank
        self._progress = progress

    def train(self, order: Order, exchange: Exchange, label: str) -> Iterator[Trained]:
        """Send each client its slice of the global adapter; give its checked update, or why not, as replies come.

        Requests are made when they are sent, and what they share is made once: memory does not grow with clients.
        """
        # Dearest first, so that no actor is left with the longest job at the end.
        clients = sorted(order.clients, key=lambda id: -self._block[id].parameters)
        sent: dict[tuple[object, ...], wire.Sent] = {}
        sizes: dict[int, int] = {}

        def shared(id: str) -> wire.Sent:
            coverage, rank = self._block[id].coverage, self._rank[id]
            # Only what folds into the base depends on the client: when it trained in a round, it had all that was
            # folded before that round.
            since = max(order.accepted.get(id, 0) - 1, 0) if order.scheme.folds else 0
            key = (coverage.hash, rank, since)
            if key not in sent:
                sent[key] = self._sent(order, coverage, rank, since)
            return sent[key]

        def requests() -> Iterator[Request]:
            for index, id in enumerate(clients):
                content = wire.pack(self._request(order, id, shared(id)), shared(id).content)
                sizes[index] = len(content)
                yield Request(id, content)

        deadline = self._config.federation.deadline_s if order.phase == "round" else None
        with self._progress.stage(label, len(clients)) as advance:
            for reply in exchange(requests(), deadline):
                id = clients[reply.index]
                update, reason = None, reply.error
                if not reason:
                    try:
                        request = self._request(order, id, shared(id))
                        update = wire.accept(reply.content, request, shared(id))
                    except LegolmError as error:
                        reason = str(error)
                yield Trained(id, update, reason, sizes.get(reply.index, 0), reply.content)
                advance(1)

    def score(
        self, jobs: Sequence[Job], exchange: Exchange, label: str, keep: Callable[[int, Sequence[Score]], None]
    ) -> None:
        """Send jobs, dearest first, and hand each job's scores to `keep` as they come. Raises `LegolmError`."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].block.parameters)

        def requests() -> Iterator[Request]:
            for job in (jobs[i] for i in order):
                rank = max((t.shape[0] for key, t in job.factors.items() if key.endswith(".A")), default=0)
                header = wire.EvaluateRequest(**self._header(job.client, job.block, rank), sets=list(job.sets))
                yield Request(job.client, wire.pack(header, codec.encode(job.factors, "none")))

        with self._progress.stage(label, len(jobs)) as advance:
            for reply in exchange(requests()):
                if reply.error:
                    raise LegolmError(f"{label}: {reply.error}")
                scores, _ = wire.unpack(reply.content, wire.ScoreReply)
                keep(order[reply.index], scores.scores)
                advance(1)

    def _sent(self, order: Order, coverage: Coverage, rank: int, since: int) -> wire.Sent:
        scheme, lora = order.scheme, self._config.lora
        name = self._codec(order.phase)
        payload, fold = scheme.payload(coverage, rank), scheme.fold(coverage, since)
        encoded = codec.encode(payload, name)
        content = encoded | with_prefix("fold", codec.encode(fold, name))
        start: Tensors = dict(codec.decode(encoded, name, Layout.of(payload)))
        if scheme.derived_seed is not None:
            made = initial_factors(
                coverage.shape, lora.targets, lora.rank, scheme.derived_seed, self._frozen, lora.ranks
            )
            start = slice_factors(coverage, made, rank) | start
        keys = adapter_keys(coverage, lora.targets, trained=self._frozen)
        fold_rank = next((tensor.shape[0] for key, tensor in fold.items() if key.endswith(".A")), 0)
        trained = adapter_layout(coverage, keys, rank, lora.ranks)
        return wire.Sent(content, start, trained, fold_rank, tensors_hash(content))

    def _request(self, order: Order, id: str, sent: wire.Sent) -> wire.TrainRequest:
        steps, done, total = steps_of(self._config, order.phase, order.number)
        everyone = len(self._config.clients) if id == wire.EVERYONE else 1
        saliency = self._config.aggregate.mask == "saliency" and order.phase == "round"
        return wire.TrainRequest(
            **self._header(id, self._block[id], self._rank[id]),
            phase=order.phase,
            round=order.number,
            steps=steps * everyone,
            done=done * everyone,
            total=total * everyone,
            seed=derive_seed(self._config.seed, order.phase, order.number, id),
            derived_seed=order.scheme.derived_seed,
            frozen=self._frozen,
            fold_rank=sent.fold_rank,
            proximal=order.scheme.proximal if order.phase == "round" else 0.0,
            codec=self._codec(order.phase),
            keep=1 - self._block[id].coverage.sparsity if saliency else 1.0,
            error_feedback=self._config.federation.error_feedback,
            accepted=order.accepted.get(id, 0),
        )

    def _codec(self, phase: Phase) -> Literal["none", "bf16", "int8"]:
        # Only rounds send anything: local and personal training stay at the client.
        return self._config.federation.codec if phase == "round" else "none"

    @property
    def _frozen(self) -> bool:
        return self._config.aggregate.form == "frozen_side"

    def _header(self, id: str, block: Block, rank: int) -> dict[str, Any]:
        return {
            "run": self._run,
            "client": id,
            "block": block.name,
            "base_fingerprint": block.base_fingerprint,
            "coverage_hash": block.coverage.hash,
            "rank": rank,
            "scale": self._config.lora.scaling,
        }


def steps_of(config: RunConfig, phase: Phase, number: int) -> tuple[int, int, int]:
    """(steps to make now, steps made before, steps in all) of a client."""
    each, rounds = config.train.steps, config.federation.rounds
    total = rounds * each + config.federation.personal_steps
    if phase == "round":
        return each, (number - 1) * each, total
    return (total, 0, total) if phase == "local" else (total - rounds * each, rounds * each, total)
