"""Ask clients to train and to score, and check what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from legolm.adapter import Tensors, adapter_keys, adapter_layout, parse_key, slice_factors, with_prefix
from legolm.aggregate import Scheme, held_by
from legolm.block import Block
from legolm.config import DpConfig, RunConfig, TrainConfig
from legolm.data import Seen
from legolm.errors import LegolmError
from legolm.federate.server.members import LLM, Members, drawn
from legolm.federate.transport import Exchange, Reply, Request
from legolm.federate.wire import (
    Broadcast,
    EvaluateRequest,
    Otherwise,
    ScoreReply,
    TrainRequest,
    TrainSettings,
    Update,
    accept,
    encode,
    pack,
    plain,
    unpack,
    write,
)
from legolm.runs import Score
from legolm.system import Progress, derive_seed

MAX_LOSS, MAX_COUNT = 1e6, 10**12
"""Of a score, nats per token and tokens: of means and sums of them something is left."""
Phase = Literal["round", "local", "personal"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Order:
    """Who trains, from what, in which phase; `accepted` is each client's last round whose update was added.

    `noise` is the multiplier of noise distributed.
    """

    clients: Sequence[str]
    scheme: Scheme
    phase: Phase
    number: int
    accepted: Mapping[str, int]
    noise: float | None = None


@dataclass(frozen=True)
class Job:
    """Score one block with one adapter, made when it is sent, on behalf of a client, on (client, split) pairs.

    With `otherwise`, another adapter, the public questions' tokens and the share of own questions that may get that
    adapter (`Familiar.of`), each question by the one that fits it.
    """

    client: str
    block: Block
    adapter: Callable[[], Tensors]
    sets: tuple[tuple[str, Split], ...]
    otherwise: tuple[Callable[[], Tensors], Seen, float] | None = None


@dataclass(frozen=True)
class Trained:
    """What came back from one client: its update, or why there is none; the reply. `asked` is its order's round."""

    client: str
    asked: int
    update: Update | None
    reason: str
    reply: bytes


@dataclass(frozen=True)
class Answered:
    """What one client answered, or why there is nothing."""

    client: str
    content: bytes
    error: str


class Dispatch:
    """Speaks to the clients of one run; `train` is the section `train` of those that have one of their own."""

    def __init__(
        self, config: RunConfig, run: str, members: Members, progress: Progress, train: Mapping[str, TrainConfig]
    ) -> None:
        self._config, self._run, self._members, self._train = config, run, members, train
        self._progress = progress

    def train(self, orders: Sequence[Order], exchange: Exchange, label: str) -> Iterator[Trained]:
        """Send each client its slice of its order's adapter; give its checked update, or why not, as replies come.

        A client is in one order only.
        """
        prepared = {id: made for order in orders for made in [self.prepared(order)] for id in order.clients}
        asked = {id: order.number for order in orders for id in order.clients}

        def content(id: str) -> bytes:
            request, broadcast = prepared[id](id)
            return pack(request, broadcast.content)

        for one in self.ask(orders, content, exchange, label):
            update, reason = None, one.error
            if not reason:
                try:
                    update = accept(one.content, *prepared[one.client](one.client))
                except LegolmError as error:
                    reason = str(error)
            yield Trained(one.client, asked[one.client], update, reason, one.content)

    def prepared(self, order: Order) -> Callable[[str], tuple[TrainRequest, Broadcast]]:
        """Each client's request to train, and what it is sent.

        It is made when it is asked for, and what they share is made once: memory does not grow with clients.
        """
        members = self._at(order)
        sent: dict[tuple[object, ...], Broadcast] = {}
        holders = self._holders(order, members)

        def shared(id: str) -> Broadcast:
            coverage, rank = members.block[id].coverage, members.rank[id]
            # Only what folds into the base depends on the client: when it trained in a round, it had all that was
            # folded before that round.
            since = max(order.accepted.get(id, 0) - 1, 0) if order.scheme.folds else 0
            train = self._train.get(id, self._config.train)
            own = train.micro_batch_tokens, train.gradient_checkpointing
            key = (coverage.hash, members.trains[id].layers, rank, since, own)
            if key not in sent:
                scheme, settings = order.scheme, self._settings(order, members, id, since)
                sent[key] = write(
                    settings,
                    coverage,
                    rank,
                    scheme.payload(coverage, rank),
                    scheme.fold(coverage, since),
                    slice_factors(coverage, holders, rank),
                    scheme.side(coverage, rank),
                )
            return sent[key]

        return lambda id: (self._request(order, members, id, shared(id)), shared(id))

    def ask(
        self, orders: Sequence[Order], content: Callable[[str], bytes], exchange: Exchange, label: str
    ) -> Iterator[Answered]:
        """Send each client its own request, and give what it answered, or why not, as replies come."""
        # Dearest first, so that no actor is left with the longest job at the end.
        parameters = {id: self._at(order).block[id].parameters for order in orders for id in order.clients}
        clients = sorted(parameters, key=lambda id: -parameters[id])
        requests = (Request(id, content(id)) for id in clients)
        deadline = self._config.federation.deadline_s if any(one.phase == "round" for one in orders) else None
        with self._progress.stage(label, len(clients)) as advance:
            for reply in self._each_once(exchange(requests, deadline), clients, label):
                yield Answered(clients[reply.index], reply.content, reply.error)
                advance(1)

    def envelope(self, order: Order, id: str) -> dict[str, Any]:
        """Whom a request of this order is for."""
        members = self._at(order)
        return self._envelope(id, members.block[id], members.rank[id])

    def _at(self, order: Order) -> Members:
        return self._members.at(order.number) if order.phase == "round" else self._members

    def score(
        self, jobs: Sequence[Job], exchange: Exchange, label: str, keep: Callable[[int, Sequence[Score]], None]
    ) -> dict[int, str]:
        """Send jobs, dearest first, and hand each one's scores to `keep` as they come.

        Gives the jobs without scores, and why.
        """
        refused: dict[int, str] = {}
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].block.parameters)
        requests = (Request(jobs[i].client, self.question(jobs[i])) for i in order)
        with self._progress.stage(label, len(jobs)) as advance:
            for reply in self._each_once(exchange(requests), [jobs[i].client for i in order], label):
                index = order[reply.index]
                try:
                    if reply.error:
                        raise LegolmError(reply.error)
                    scores = checked_scores(reply.content, jobs[index].sets)
                except LegolmError as error:
                    refused[index] = str(error)
                else:
                    keep(index, scores)
                advance(1)
        return refused

    def question(self, job: Job) -> bytes:
        """The request that asks a client for a job's scores."""
        config, factors, otherwise = self._config, job.adapter(), None
        content = encode(factors, "none")
        rank, ranks = _ranks(factors)
        if job.otherwise is not None:
            make, seen, away = job.otherwise
            its, single = _ranks(other := make())
            otherwise = Otherwise(rank=its, ranks=single, prompts=seen.prompts, away=away)
            content |= with_prefix("otherwise", encode(other, "none") | {"seen": seen.packed()})
        header = EvaluateRequest(
            **self._envelope(job.client, job.block, rank),
            sets=list(job.sets),
            targets=config.lora.targets,
            ranks=ranks,
            max_length=config.train.max_length,
            long_examples=config.train.long_examples,
            precision=_decided(config),
            batch_size=config.evaluate.batch_size,
            otherwise=otherwise,
        )
        return pack(header, content)

    def _each_once(self, replies: Iterable[Reply], clients: Sequence[str], label: str) -> Iterator[Reply]:
        """One reply for each request: others are named and dropped, and one that does not come is an error's."""
        left = set(range(len(clients)))
        for reply in replies:
            if reply.index in left:
                left.remove(reply.index)
                yield replace(reply, error=plain(reply.error))
            else:
                whose = clients[reply.index] if 0 <= reply.index < len(clients) else "nobody"
                self._progress.note(f"{label}: one more reply of {whose} (request {reply.index}) was dropped")
        for index in sorted(left):
            yield Reply(index, error="no reply came")

    def _settings(self, order: Order, members: Members, id: str, since: int) -> TrainSettings:
        config, scheme = self._config, order.scheme
        coverage, trained = members.block[id].coverage, members.trains[id].layers
        train = self._train.get(id, config.train)
        # Its rows are everyone's, and each of its trainings stands for one client's.
        if id == LLM and train.epochs is not None:
            train = train.model_copy(update={"epochs": train.epochs / len(config.clients)})
        # Only rounds send anything: local and personal training stay at the client.
        travels = order.phase == "round"
        return TrainSettings(
            targets=config.lora.targets,
            run_rank=config.lora.rank,
            ranks=config.lora.ranks,
            dropout=config.lora.dropout,
            train=train,
            precision=_decided(config),
            frozen_side=scheme.frozen_side,
            derived_seed=scheme.derived_seed,
            whitened=scheme.whitened is not None,
            fold_seeds=scheme.fold_seeds(since),
            proximal=scheme.proximal if travels else 0.0,
            codec=config.federation.codec if travels else "none",
            layers=list(trained) if trained != coverage.layers else None,
            keep=scheme.keep(coverage.mask_sparsity) if travels else 1.0,
            error_feedback=config.federation.error_feedback and scheme.basis_stays,
            dp=self._dp(order),
        )

    def _dp(self, order: Order) -> DpConfig | None:
        """The noise that clients add themselves."""
        dp = self._config.privacy.dp
        if order.phase != "round" or dp.level == "none" or (dp.level == "client" and dp.noise == "central"):
            return None
        return dp.model_copy(update={"noise_multiplier": order.noise}) if dp.level == "client" else dp

    def _holders(self, order: Order, members: Members) -> Tensors:
        """How many of the round's clients hold each entry, where they need it for their part of the noise."""
        dp, lora = self._dp(order), self._config.lora
        if dp is None or dp.noise != "distributed" or self._config.privacy.secure is not None:
            return {}
        whole = members.llm.coverage
        keys = adapter_keys(whole, lora.targets, trained=order.scheme.frozen_side)
        there = [(members.trains[id], members.rank[id]) for id in members.draw(self._config, order.number)]
        return held_by(adapter_layout(whole, keys, lora.rank, lora.ranks).shapes, there)

    def _request(self, order: Order, members: Members, id: str, broadcast: Broadcast) -> TrainRequest:
        parts, done, total = self._steps(order, id)
        # `*`: pooled runs of before named their client so, and go on giving what they gave.
        seed = derive_seed(self._config.seed, order.phase, order.number, "*" if id == LLM else id)
        return TrainRequest(
            **self._envelope(id, members.block[id], members.rank[id]),
            phase=order.phase,
            round=order.number,
            steps=sum(parts),
            done=done,
            total=total,
            parts=parts if len(parts) > 1 else [],
            seed=seed,
            accepted=order.accepted.get(id, 0),
            settings=broadcast.settings,
        )

    def _steps(self, order: Order, id: str) -> tuple[list[int], int, int]:
        config, number = self._config, order.number
        if id != LLM:
            return steps_of(config, order.phase, number, 0 if order.phase == "round" else self.turns[id])
        # For each client that a round would draw.
        draws, each = [max(1, len(one)) for one in self._draws], config.train.steps
        return draws[number - 1] * [each], sum(draws[: number - 1]) * each, sum(draws) * each

    @cached_property
    def turns(self) -> Counter[str]:
        """In how many rounds each client is to train; one that holds too little for that, in how many it would."""
        able, numbers = self._members.able(self._config), range(1, self._config.federation.rounds + 1)
        would = Counter(id for one in self._draws for id in one)
        if len(able) == len(self._members.clients):
            return would
        to = Counter(id for number in numbers for id in drawn(self._config, number, able))
        return Counter({id: (to if id in able else would)[id] for id in self._members.clients})

    @cached_property
    def _draws(self) -> list[list[str]]:
        """The clients of each round, were all able to take part."""
        clients, numbers = set(self._members.clients), range(1, self._config.federation.rounds + 1)
        return [drawn(self._config, number, clients) for number in numbers]

    def _envelope(self, id: str, block: Block, rank: int) -> dict[str, Any]:
        return {
            "run": self._run,
            "client": id,
            "block": block.name,
            "base_fingerprint": block.base_fingerprint,
            "coverage_hash": block.coverage.hash,
            "rank": rank,
            "scale": self._config.lora.scaling,
        }


def _ranks(factors: Tensors) -> tuple[int, dict[str, int]]:
    """The rank, and that of single modules where it is less."""
    ranks = {parse_key(key)[1].rpartition(".")[2]: len(t) for key, t in factors.items() if key.endswith(".A")}
    rank = max(ranks.values(), default=0)
    return rank, {module: own for module, own in ranks.items() if own < rank}


def checked_scores(content: bytes, sets: Sequence[tuple[str, Split]], of: int = 1) -> Sequence[Score]:
    """A reply's scores, one for each of `sets`, where `of` so many replies one is made that is checked again.

    Raises `LegolmError` with the first that cannot be one.
    """
    most = MAX_COUNT // of
    found = unpack(content, ScoreReply)[0].scores
    if len(found) != len(sets):
        raise LegolmError(f"{len(found)} scores came for {len(sets)} sets")
    for (client, split), score in zip(sets, found, strict=True):
        where = f"its score on {split} data of {client!r}"
        if not 0 <= score.loss <= MAX_LOSS:
            raise LegolmError(f"{where} has loss {score.loss}; if training diverged, lower train.learning_rate")
        if not 0 <= (score.stderr or 0.0) <= MAX_LOSS:
            raise LegolmError(f"{where} has standard error {score.stderr}")
        if not 0 <= score.exact_match <= 1 or not all(1 <= n <= most for n in (score.tokens, score.examples)):
            raise LegolmError(
                f"{where} has exact_match {score.exact_match}, tokens {score.tokens}, examples {score.examples}"
            )
    return found


def steps_of(config: RunConfig, phase: Phase, number: int, turns: int = 0) -> tuple[list[int], int, int]:
    """(steps of each training to make now, steps made before, steps in all) of a client that trains in `turns` rounds.

    The rounds' learning rate falls with the rounds, whatever each client does after them: what is shared is not left
    at half of its way. Own steps go on at the end of the longer way that training alone goes, which is all trainings
    that the client makes in the federation, one after the other.
    """
    each, own, rounds = config.train.steps, config.federation.personal_steps, config.federation.rounds
    if phase == "round":
        return [each], (number - 1) * each, rounds * each
    total = turns * each + own
    last = [own] if own else []
    return (turns * [each] + last, 0, total) if phase == "local" else (last, turns * each, total)


def _decided(config: RunConfig) -> Literal["fp32", "bf16"]:
    assert config.precision != "auto"  # the pipeline decides it once a run
    return config.precision
