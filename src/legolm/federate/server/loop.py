"""The rounds of one run over any transport: before, local only, rounds, personal models; each a stage that is kept.

A stage leaves a folder that appears only when it is whole (`runs.Stages`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from legolm.adapter import Tensors, tensors_hash
from legolm.aggregate import Scheme, make_scheme
from legolm.block import Block
from legolm.config import RunConfig, TrainConfig
from legolm.errors import LegolmError, UnusableRoundError
from legolm.federate.server.account import Account
from legolm.federate.server.alone import Alone
from legolm.federate.server.begin import begin
from legolm.federate.server.dispatch import Dispatch
from legolm.federate.server.gathering import Gathering
from legolm.federate.server.members import LLM, Members
from legolm.federate.server.mixture import AWAY, let_go
from legolm.federate.server.pace import asked as tags
from legolm.federate.server.protecting import Known
from legolm.federate.server.replay import read_kept, replay
from legolm.federate.server.scoring import Scoring
from legolm.federate.server.secure import SecureRounds, check_withheld, roster_of
from legolm.federate.transport import Exchange, counted
from legolm.runs import (
    UNSCORED,
    Clock,
    Global,
    Refusal,
    RoundRecord,
    RunDir,
    StageRecord,
    Stages,
    Traffic,
    Traffics,
    check_state,
    clients_of,
    dump_sealed,
    read_sealed,
    rounds_of,
)
from legolm.system import Progress, atomic_folder, atomic_write


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
        secure = None
        if config.privacy.secure is not None:
            self._check_withheld()
            secure = SecureRounds(config, run, self._members, self._dispatch, roster_of(config, run), progress)
        self._gathering = Gathering(
            folder, config, self._members, self._dispatch, self._stages, self._account, secure, progress
        )
        self._latest: tuple[int, Scheme] | None = None
        self.after_round: Callable[[], None] = lambda: None
        """Called after each round that this process finishes."""

    def run(self, exchange: Exchange) -> None:
        """All that needs clients. Stages that are finished are passed over."""
        self._before(exchange)
        self._score_again(exchange)
        if self._config.evaluate.local_only:
            self._alone.run("local", exchange)
        number = 0
        while (number := number + 1) <= self._stages.rounds:  # which a budget may end
            self._round(number, exchange)
        self._round(self._stages.rounds, exchange)  # it was not to be the last when it was made
        if self._config.own_parts:
            self._alone.run("personal", exchange)

    def write_lines(self) -> None:
        """`metrics.jsonl` of what is finished."""
        self._stages.write_lines()

    @property
    def finished(self) -> bool:
        """Nothing that needs clients is left to do."""
        return self._stages.finished and not self._lacks_scores(self._stages.rounds) and not self._unknowing()

    def _score_again(self, exchange: Exchange) -> None:
        for number in self._unknowing():
            scored = self.score_global(self.scheme(number), exchange, f"round {number}: evaluate as it is now")
            self._stages.score_again(self._folder.round(number), scored)
        self._stages.write_lines()

    def _unknowing(self) -> list[int]:
        """Finished rounds whose scores know nothing of clients that came later."""
        found = []
        for record in rounds_of(self.records()):
            there = {id for one in record.held for id in one.clients} | {one.client for one in record.unscored}
            if there and there != set(self._members.clients):
                found.append(record.round)
        return found

    def _lacks_scores(self, number: int) -> bool:
        """Whether a finished round is still to be scored.

        Whoever scored it ended with it; or that it would be the last was not known, as where a budget ended the run, or
        who resumes it wants fewer.
        """
        due = number % self._config.evaluate.every == 0 or number == self._stages.rounds
        newest = not self._stages.has(self._folder.round(number + 1))
        return due and newest and self._stages.round(number).validation is None

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

    def away(self, id: str) -> float:
        """Share of a client's own questions that the global update may answer, where each question gets its model."""
        ended = {one.client: one for one in clients_of(self.records(), "personal")}
        return let_go(ended[id].mixtures) if id in ended else AWAY  # who was passed over has the global update anyway

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

    def check_kept(self, last: int) -> None:
        """Raise `LegolmError` unless all stages are there, and each kept update up to round `last` is what came."""
        for path in self._stages.missing:
            raise LegolmError(
                f"{path}: is not there; restore it, or let `legolm run --resume` make it again, and what came after it"
            )
        for record in rounds_of(self.records())[: last + 1]:
            check_state(self._folder.round(record.round), record)
            for client in record.accepted:
                read_kept(self._folder, record, client)

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
        there = self._stages.has(path)
        if there and not self._lacks_scores(number):
            return
        # Of a round that was over without scores the clock knows nothing any more.
        before = self._stages.round(number).seconds if there and not self._clock.seconds(f"round {number}") else 0.0
        with self._clock.stage(f"round {number}"):
            if not there:
                self._train_round(number, path, exchange)
            self._score_round(number, path, exchange, before)
        self._stages.write_lines()
        self._limit()
        self.after_round()

    def _train_round(self, number: int, path: Path, exchange: Exchange) -> None:
        scheme, drawn = self.scheme(number - 1), self._members.draw(self._config, number)
        # From here on it is no finished round's.
        self._latest = None
        done = self._stages.before(number)
        asked, sent = tags(self._config, done, number, drawn), dict[str, Traffic]()
        with atomic_folder(path) as folder:
            weighing = self._gathering.weighing(scheme)
            came = self._gathering.round(number, asked, drawn, scheme, weighing, counted(exchange, sent), folder)
            # Replies came in any order; the record does not depend on it.
            accepted = [id for id in asked if id in came.added]
            train, refused, kept = came.train, came.refused, came.kept
            shares: dict[str, float] = {}
            if accepted:
                self._account.disturb(done, scheme, weighing, [id for id in asked if id not in came.added])
                shares = weighing.finish()
            self._check_global(number, scheme, accepted)
            left = asked.keys() - came.added - refused.keys() if self._config.federation.buffer is not None else set()
            record = RoundRecord(
                round=number,
                accepted=accepted,
                refused=[Refusal(client=id, reason=refused[id]) for id in asked if id in refused],
                train={id: train[id] for id in accepted if id in train},
                shares={id: shares[id] for id in accepted if id in shares},
                # Data at one place travels no more.
                bytes={id: sent[id] for id in asked if id in sent and id != LLM},
                updates={id: kept[id] for id in accepted if id in kept},
                tags={id: asked[id] for id in accepted if asked[id] < number},
                waiting={id: tag for id, tag in asked.items() if id in left},
                closed=came.closed,
                seconds=self._clock.seconds(f"round {number}"),
                **dict(UNSCORED),
            )
            self._stages.fill(folder, path, scheme.state(), self._account.charged(done, record))
        self._latest = number, scheme

    def _score_round(self, number: int, path: Path, exchange: Exchange, before: float) -> None:
        """A round is kept before anybody is asked about it.

        What clients did for it is not lost with who ends meanwhile; nor has its noise been seen before it is on record.
        """
        if not self._lacks_scores(number):
            return
        scored = self.score_global(self.scheme(number), exchange, f"round {number}: evaluate")
        self._stages.score_again(path, scored, before + self._clock.seconds(f"round {number}"))
        record = self._stages.round(number)
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

    def _limit(self) -> None:
        """Stop before the round that would pass the budget of `privacy.dp`."""
        rounds = self._config.federation.rounds
        if self._config.privacy.dp.level != "none":
            self._stages.limit(self._account.most(self._stages.before(rounds + 1)))

    def _check_global(self, number: int, scheme: Scheme, accepted: Sequence[str]) -> None:
        """Raise `UnusableRoundError` when the new global adapter is not finite, before anybody is asked about it."""
        for key, tensor in scheme.state().items():
            if not bool(tensor.isfinite().all()):
                raise UnusableRoundError(
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
