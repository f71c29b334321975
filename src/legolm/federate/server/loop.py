"""The rounds of one run over any transport: before, local only, rounds, personal models; each a stage that is kept.

A stage leaves a folder that appears only when it is whole (`runs.Stages`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from legolm.adapter import Tensors, tensors_hash
from legolm.aggregate import Scheme, Weighing, make_scheme
from legolm.block import Block
from legolm.config import RunConfig, TrainConfig
from legolm.errors import LegolmError
from legolm.federate.server.account import Account
from legolm.federate.server.alone import Alone
from legolm.federate.server.begin import begin
from legolm.federate.server.dispatch import Dispatch, Order, Trained
from legolm.federate.server.members import LLM, Members
from legolm.federate.server.pace import Ages, first_to_end
from legolm.federate.server.pace import asked as tags
from legolm.federate.server.protecting import Known
from legolm.federate.server.replay import last_accepted, replay, updates
from legolm.federate.server.scoring import Scoring
from legolm.federate.server.secure import SecureRounds, check_withheld, moved, roster_of
from legolm.federate.transport import Exchange
from legolm.runs import (
    UNSCORED,
    UPDATES,
    Clock,
    Global,
    Refusal,
    RoundRecord,
    RunDir,
    StageRecord,
    Stages,
    Traffic,
    Traffics,
    Training,
    clients_of,
    dump_sealed,
    read_sealed,
    rounds_of,
)
from legolm.system import Progress, atomic_folder, atomic_write

AGAIN_S = 10.0
"""Before devices are asked again for want of updates."""


@dataclass
class _Came:
    """What a round's clients sent: who was added, what they say of it, why others were not, bytes, kept updates.

    `closed` is the share of the entries that a secure sum did not open; it `stands`, with whatever it opened, where
    devices would not open another one of this round.
    """

    train: dict[str, Training] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    closed: float | None = None
    stands: bool = False


class Rounds:
    """`blocks` are the cut blocks and the LLM by name, `block_of` the block's name of each client by id.

    `train` is the section `train` of clients that have one of their own.
    Runs of the same data and blocks that give the same folder as `shared` score them before training once.
    """

    def __init__(
        self,
        folder: RunDir,
        config: RunConfig,
        run: str,
        blocks: Mapping[str, Block],
        block_of: Mapping[str, str],
        progress: Progress,
        shared: Path | None = None,
        clock: Clock | None = None,
        train: Mapping[str, TrainConfig] | None = None,
    ) -> None:
        self._folder, self._config, self._shared, self._progress = folder, config, shared, progress
        self._clock = clock or Clock()
        self._members = Members.of(config, blocks, block_of)
        self._dispatch = Dispatch(config, run, self._members, progress, train or {})
        self.known = Known(folder, config, self._members)
        self._scoring = Scoring(config, self._members, self._dispatch, self.known)
        self._stages = Stages(folder, config)
        self._alone = Alone(
            folder,
            config,
            self._members,
            self._dispatch,
            self._scoring,
            self._stages,
            self._clock,
            progress,
            self.scheme,
            self.adapter,
        )
        self._account = Account(config, self._members)
        self._limit()
        self._secure = None
        if config.privacy.secure is not None:
            self._check_withheld()
            self._secure = SecureRounds(config, run, self._members, self._dispatch, roster_of(config, run), progress)
        self._latest: tuple[int, Scheme] | None = None
        self.after_round: Callable[[], None] = lambda: None
        """Called after each round that this process finishes."""

    def run(self, exchange: Exchange) -> None:
        """All that needs clients. Stages that are finished are passed over."""
        self._before(exchange)
        for number in self._unknowing():
            label = f"round {number}: evaluate with those who came"
            scored = self.score_global(self.scheme(number), exchange, label)
            self._stages.score_again(self._folder.round(number), scored)
        self._stages.write_lines()
        if self._config.evaluate.local_only:
            self._alone.run("local", exchange)
        number = 0
        while (number := number + 1) <= self._stages.rounds:  # which a budget may end
            self._round(number, exchange)
        if self._config.own_parts:
            self._alone.run("personal", exchange)

    def write_lines(self) -> None:
        """`metrics.jsonl` of what is finished."""
        self._stages.write_lines()

    @property
    def finished(self) -> bool:
        """Nothing that needs clients is left to do."""
        return self._stages.finished and not self._unknowing()

    def _unknowing(self) -> list[int]:
        """Finished rounds whose scores know nothing of clients that came later."""
        rounds = [number for number in range(self._stages.rounds + 1) if self._stages.has(self._folder.round(number))]
        scored = {number: self._stages.round(number) for number in rounds}
        found = []
        for number, record in scored.items():
            there = {id for one in record.held for id in one.clients} | {one.client for one in record.unscored}
            if there and there != set(self._members.clients):
                found.append(number)
        return found

    def records(self) -> list[StageRecord]:
        """Of every finished stage, in order."""
        return self._stages.records()

    def best(self, by: Literal["validation", "llm_validation"]) -> int:
        """The finished round that is the best by this."""
        return self._stages.best(by)

    def quorum(self, number: int) -> float:
        """The share of the clients that must hold what the LLM has of a finished round's update."""
        return next(one.quorum for one in rounds_of(self.records()) if one.round == number)

    def final_factors(self, id: str | None) -> Tensors:
        """What a client (None: the LLM) ends with: its own last adapter if any, else its slice of its best round's."""
        if id is None:
            best = self.best("llm_validation")
            return self.known(self.scheme(best), self.quorum(best))
        if self._config.own_parts or not self._stages.rounds:
            stage = "personal" if self._config.own_parts else "local"
            found = self._stages.state(self._folder.client_stage(stage, id))
            if found:  # else its training was passed over, and it has what the rounds gave it
                return found
        return self.adapter(id, self.best("validation"))

    def adapter(self, id: str, number: int) -> Tensors:
        """A client's slice of the global adapter after a finished round."""
        return self.scheme(number).adapter(self._members.block[id].coverage, self._members.rank[id])

    def alone(self, id: str) -> Tensors:
        """What a client ended with alone; empty where it was not trained so, or refused."""
        return self._alone.ended(id)

    def start_hash(self, number: int) -> str:
        """Of the global adapter after this round, from which a last training starts, in the LLM's coordinates."""
        return tensors_hash(self.scheme(number).adapter(self._members.llm.coverage, self._members.rank[LLM]))

    def apart(self) -> set[str]:
        """Clients whose final factors must not be averaged with those of the same start.

        A mixture's stand one after the other, and what was learned alone began elsewhere; not so where all have the
        same frozen ones.
        """
        if make_scheme(self._config.aggregate).frozen_side:
            return set()
        ended = clients_of(self.records(), "personal")
        return {one.client for one in ended if len(one.weights) > 1 or "local" in one.weights}

    def scheme(self, number: int) -> Scheme:
        """The scheme as it was after a finished round. The one used last is in memory already."""
        if self._latest is None or self._latest[0] != number:
            state = self._stages.state(self._folder.round(number))
            self._latest = number, begin(self._config, self._members.llm, self._folder, state)
        return self._latest[1]

    def replay(self, last: int, without: Collection[str]) -> Scheme:
        """The scheme after round `last` had these clients' kept updates not been added (`replay`)."""
        return replay(self._folder, self._config, self._members, self._dispatch, self.records(), last, without)

    def score_global(self, scheme: Scheme, exchange: Exchange, label: str) -> Global:
        """The LLM and the clients' blocks with the global update, by whoever may score them."""
        return self._scoring.of_global(scheme, exchange, label)

    # Stages

    def _before(self, exchange: Exchange) -> None:
        """Round 0: the server's initial adapter, and every block and the LLM before fine-tuning."""
        path = self._folder.round(0)
        if self._stages.has(path):
            return
        with self._clock.stage("before"):
            scheme = begin(self._config, self._members.llm, self._folder)
            known = self._shared_scores()
            if known and known.exists():
                scored = read_sealed(known, Global, "delete it")
            else:
                scored = self.score_global(scheme, exchange, "before: evaluate")
                if known and not scored.unscored:
                    atomic_write(known, dump_sealed(scored))
            asked = self._folder.sums_traffic
            sent = read_sealed(asked, Traffics, "delete it").bytes if asked.exists() else {}
            record = RoundRecord(round=0, bytes=sent, seconds=self._clock.seconds("before"), **dict(scored))
            self._stages.keep(path, scheme.state(), record)
            self._latest = 0, scheme

    def _round(self, number: int, exchange: Exchange) -> None:
        """Fine-tune the drawn clients' blocks, aggregate updates as they come, apply the global update, evaluate."""
        path = self._folder.round(number)
        if self._stages.has(path):
            return
        with self._clock.stage(f"round {number}"):
            self._train_round(number, path, exchange)
        self._limit()
        self.after_round()

    def _train_round(self, number: int, path: Path, exchange: Exchange) -> None:
        scheme, drawn = self.scheme(number - 1), self._members.draw(self._config, number)
        # From here on it is no finished round's.
        self._latest = None
        done = self._done(number)
        asked = tags(self._config, done, number, drawn)
        with atomic_folder(path) as folder:
            if self._secure is None:
                weighing = Weighing(self._config.aggregate, scheme)
                came = self._single(number, asked, scheme, weighing, exchange, folder)
            else:
                # Clients have weighed their changes themselves.
                weighing = Weighing(self._config.aggregate.model_copy(update={"weight": "examples"}), scheme)
                came = self._sums(number, drawn, scheme, weighing, exchange)
            # Replies came in any order; the record does not depend on it.
            accepted = [id for id in asked if id in came.added]
            train, refused, traffic, kept = came.train, came.refused, came.traffic, came.kept
            if not came.stands:
                self._check_enough(number, list(asked), accepted, refused)
            shares: dict[str, float] = {}
            if accepted:
                self._account.disturb(done, scheme, weighing, [id for id in asked if id not in came.added])
                shares = weighing.finish()
            self._check_global(number, scheme, accepted)
            due = number % self._config.evaluate.every == 0 or number == self._stages.rounds
            scored = self.score_global(scheme, exchange, f"round {number}: evaluate") if due else UNSCORED
            left = asked.keys() - came.added - refused.keys() if self._config.federation.buffer is not None else set()
            record = RoundRecord(
                round=number,
                accepted=accepted,
                refused=[Refusal(client=id, reason=refused[id]) for id in asked if id in refused],
                train={id: train[id] for id in accepted if id in train},
                shares={id: shares[id] for id in accepted if id in shares},
                # Data at one place travels no more.
                bytes={id: traffic[id] for id in asked if id in traffic and id != LLM},
                updates={id: kept[id] for id in accepted if id in kept},
                tags={id: asked[id] for id in accepted if asked[id] < number},
                waiting={id: tag for id, tag in asked.items() if id in left},
                closed=came.closed,
                seconds=self._clock.seconds(f"round {number}"),
                **dict(scored),
            )
            record = self._account.charged(done, record)
            self._stages.fill(folder, path, scheme.state(), record)
        self._stages.write_lines()
        self._latest = number, scheme
        if record.validation is None:
            return
        part = f" with what {record.quorum:.0%} of the clients hold" if record.quorum else ""
        llm = "" if record.llm_validation is None else f"LLM {record.llm_validation:.3f}{part}, "
        cost = f"; epsilon {record.privacy.epsilon:.3g} so far" if record.privacy else ""
        self._progress.say(f"round {number}: loss on validation data: {llm}blocks {record.validation:.3f}{cost}")

    def _check_withheld(self) -> None:
        """Again, now that the blocks are cut: which neurons they share was only planned before."""
        frozen_side, members = make_scheme(self._config.aggregate).frozen_side, self._members
        numbers = [n for n in range(1, self._stages.rounds + 1) if not self._stages.has(self._folder.round(n))]
        there = ((members.draw(self._config, number), members.at(number).trains) for number in numbers)
        rounds = ([(trains[id], members.rank[id]) for id in drawn] for drawn, trains in there)
        check_withheld(self._config, frozen_side, rounds)

    def _single(
        self, number: int, asked: dict[str, int], scheme: Scheme, weighing: Weighing, exchange: Exchange, folder: Path
    ) -> _Came:
        """Each client's update by itself, added as it comes."""
        # Data at one place gives nobody's update.
        keeps = self._config.federation.keep_updates and list(asked) != [LLM]
        came, ages = _Came(), Ages(self._config, self._members, self._done(number))
        for one in self._updates(number, asked, came.train, scheme, exchange):
            came.traffic[one.client] = Traffic(up=one.bytes_up, down=one.bytes_down)
            if one.update is None:
                came.refused[one.client] = one.reason
                continue
            change = ages.discounted(one.client, one.asked, number, one.update.change)
            weighing.add(one.client, change, ages.coverage(one.client, one.asked))
            came.train[one.client] = one.update.training
            came.added.add(one.client)
            came.refused.pop(one.client, None)
            if keeps:
                (folder / UPDATES).mkdir(exist_ok=True)
                (folder / UPDATES / f"{one.client}.safetensors").write_bytes(one.reply)
                came.kept[one.client] = hashlib.sha256(one.reply).hexdigest()
        return came

    def _sums(self, number: int, drawn: Sequence[str], scheme: Scheme, weighing: Weighing, exchange: Exchange) -> _Came:
        """What the clients' updates add up to, and nothing of one of them."""
        assert self._secure is not None
        last, done = None, self._done(number)
        if number > 1:
            before, after = (self._stages.state(self._folder.round(at)) for at in (number - 2, number - 1))
            last = moved(before, after, self._config.aggregate)
        order = Order(drawn, scheme, "round", number, last_accepted(done), self._account.multiplier(done))
        summed, trains = self._secure.round(order, last, exchange), self._members.at(number).trains
        for id, change in summed.changes.items():
            weighing.add(id, change, trains[id])
        stands = summed.asked and self._config.federation.engine == "deployment"
        return _Came({}, dict(summed.refused), dict(summed.traffic), {}, set(summed.changes), summed.closed, stands)

    def _done(self, number: int) -> list[RoundRecord]:
        """The records of the rounds before this one, from the first on."""
        return [one for one in rounds_of(self.records()) if 0 < one.round < number]

    def _limit(self) -> None:
        """Stop before the round that would pass the budget of `privacy.dp`."""
        rounds = self._config.federation.rounds
        if self._config.privacy.dp.level != "none":
            self._stages.limit(self._account.most(self._done(rounds + 1)))

    def _updates(
        self, number: int, asked: dict[str, int], train: Mapping[str, Training], scheme: Scheme, exchange: Exchange
    ) -> Iterator[Trained]:
        """What the clients return that were asked, as many as the buffer takes; `train` has those that were added.

        Devices of their own come back: while too few updates are there, the others are asked again.
        """
        federation, records = self._config.federation, self.records()
        (least, why), noise = self._least(list(asked)), self._account.multiplier(self._done(number))
        own, left = federation.engine == "deployment", list(asked)
        if federation.buffer is not None and not own:
            left = first_to_end(self._config, rounds_of(records), asked)

        def after(round: int) -> Scheme:
            if round == number - 1:
                return scheme
            return begin(self._config, self._members.llm, self._folder, self._stages.state(self._folder.round(round)))

        while True:
            now = {id: asked[id] for id in left}
            came = updates(self._config, self._dispatch, records, number, now, after, exchange, noise)
            with closing(came):
                for one in came:
                    yield one
                    if federation.buffer is not None and len(train) >= federation.buffer:
                        return
            if not own or len(train) >= least:
                return
            left = [id for id in asked if id not in train]
            self._progress.note(f"round {number}: {len(train)} updates accepted, {why}; asked again: {', '.join(left)}")
            time.sleep(AGAIN_S)

    def _check_enough(
        self, number: int, drawn: Sequence[str], accepted: Sequence[str], refused: Mapping[str, str]
    ) -> None:
        least, why = self._least(drawn)
        if len(accepted) < least:
            reasons = "; ".join(f"{id}: {refused[id]}" for id in drawn if id in refused)
            raise LegolmError(f"round {number}: {len(accepted)} updates accepted, {why} ({reasons})")

    def _least(self, drawn: Sequence[str]) -> tuple[int, str]:
        """How many updates a round needs, and why: with fewer, parts of the noise may be missing. Secure sums see to
        that themselves, entry by entry."""
        replies, dp = self._config.federation.min_replies, self._config.privacy.dp
        if self._secure is None and dp.noise == "distributed" and (least := len(drawn) - dp.dropouts) > replies:
            return least, f"privacy.dp.dropouts is {dp.dropouts} of {len(drawn)}"
        return min(replies, len(drawn)), f"federation.min_replies is {replies}"

    def _check_global(self, number: int, scheme: Scheme, accepted: Sequence[str]) -> None:
        """Raise `LegolmError` when the new global adapter is not finite, before anybody is asked about it."""
        for key, tensor in scheme.state().items():
            if not bool(tensor.isfinite().all()):
                raise LegolmError(
                    f"round {number}: the new global adapter is not finite in {key}, made of the updates of "
                    f"{', '.join(accepted)}; lower aggregate.server_learning_rate or train.learning_rate, or refuse "
                    "outliers (aggregate.outliers)"
                )

    def _shared_scores(self) -> Path | None:
        """Where runs find each other's scores before training; nowhere for one that starts from a trained adapter."""
        config, members = self._config, self._members
        if self._shared is None or config.lora.start is not None or config.aggregate.start is not None:
            return None
        fields = {"model", "seed", "data", "precision", "device", "lora", "evaluate"}
        identity = self._folder.identity()
        what = [
            config.model_dump_json(include=fields, exclude={"evaluate": {"local_only"}}),
            config.train.max_length,
            config.train.long_examples,
            identity.base_fingerprint,
            identity.data_fingerprint,
            [(id, members.rank[id], members.block[id].coverage.hash) for id in members.clients],
            [(members.block[id].path / "manifest.json").read_text() for id in members.clients],
        ]
        return self._shared / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
