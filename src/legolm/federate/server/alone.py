"""Training outside the rounds: each client alone, and what it ends with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

from legolm.adapter import Tensors, concatenated, mixed
from legolm.aggregate import Scheme
from legolm.config import RunConfig
from legolm.errors import LegolmError, UnusableRoundError
from legolm.federate.server.dispatch import Dispatch, Job, Order
from legolm.federate.server.members import Members
from legolm.federate.server.mixture import choose, choose_own, let_go, points
from legolm.federate.server.public import seen_in_public
from legolm.federate.server.scoring import Scoring, by_client
from legolm.federate.transport import Exchange, counted
from legolm.runs import (
    ClientRecord,
    Clock,
    Mixture,
    PassedRecord,
    RunDir,
    Score,
    Stages,
    Traffic,
    Training,
    Weights,
    clients_of,
    load_adapter_state,
    save_adapter_state,
)
from legolm.system import Progress, scratch_folder


@dataclass(frozen=True)
class Alone:
    """Of one run. `scheme` is the scheme after a finished round, `adapter` a client's slice of its global adapter."""

    folder: RunDir
    config: RunConfig
    members: Members
    dispatch: Dispatch
    scoring: Scoring
    stages: Stages
    clock: Clock
    progress: Progress
    scheme: Callable[[int], Scheme]
    adapter: Callable[[str, int], Tensors]

    def run(self, stage: Literal["local", "personal"], exchange: Exchange) -> None:
        """Train each client without aggregation, and score its block.

        `local` is the baseline: alone for every step that a client makes in the federation. `personal` is what it ends
        with: own steps on from the best global update, if any, and the mixture that its validation data choose.
        """
        clients = self.members.clients
        left = [id for id in clients if not self.stages.has(self.folder.client_stage(stage, id))]
        if not left:
            return
        with self.clock.stage(stage):
            self._train(stage, left, exchange)
        self.stages.write_lines()
        found = clients_of(self.stages.records(), stage)
        if not found:  # some were passed over in an earlier process, the rest in this one
            raise LegolmError(f"{stage}: every client was refused; remove {self.folder.path / stage} to ask again")
        loss = fmean(one.validation for one in found)
        self.progress.say(f"{stage}: loss on validation data: blocks {loss:.3f}")

    def _train(self, stage: Literal["local", "personal"], left: Sequence[str], exchange: Exchange) -> None:
        clients, start = self.members.clients, 0 if stage == "local" else self.stages.best("validation")
        scheme = self.scheme(start)
        trains = stage == "local" or "personal" in self.config.own_parts
        training: dict[str, Training] = {}
        refused: dict[str, str] = {}
        mixtures: dict[str, list[Mixture]] = {}
        sent: dict[str, Traffic] = {}
        if self.config.evaluate.scores == "own":  # else it is no device's
            exchange = counted(exchange, sent)
        # What each learned waits on the disk until it is scored: the server's memory must not grow with clients.
        with scratch_folder(self.folder.path / stage) as own:
            own_steps, turns = self.config.federation.personal_steps, self.dispatch.turns
            idle = [id for id in left if stage == "local" and not own_steps + turns[id]]  # whom no round draws
            for id in idle:
                save_adapter_state(own / id, self.adapter(id, start))
            order = Order([id for id in left if id not in idle], scheme, stage, start, {})
            for one in self.dispatch.train([order], exchange, f"{stage}: train") if trains else ():
                if one.update is None:
                    refused[one.client] = one.reason
                    continue
                change, coverage = one.update.change, self.members.block[one.client].coverage
                ended = {key: t + change.delta[key] if key in change.delta else t for key, t in change.received.items()}
                save_adapter_state(own / one.client, concatenated(scheme.fold(coverage, 0), ended))
                training[one.client] = one.update.training
            if stage == "personal" and self.config.federation.personal != "last":
                mixtures = self._mix(start, [id for id in left if id not in refused], own, exchange, refused)
            by_input = stage == "personal" and self.config.federation.personal == "by_input"
            seen = seen_in_public(self.config, self.members.llm) if by_input else None
            jobs = [
                Job(
                    id,
                    self.members.block[id],
                    partial(load_adapter_state, own / id),
                    self.scoring.sets_of(id),
                    None if seen is None else (partial(self.adapter, id, start), seen, let_go(mixtures[id])),
                )
                for id in left
                if id not in refused
            ]

            def keep(index: int, scores: Sequence[Score]) -> None:
                job = jobs[index]
                record = ClientRecord(
                    stage=stage,
                    client=job.client,
                    scores=by_client(job.sets, scores),
                    train=training.get(job.client),
                    mixtures=(found := mixtures.get(job.client, [])),
                    weights=self._chosen(found) if found else {},
                    validation=scores[-1].loss,
                    bytes=sent.get(job.client),
                    seconds=self.clock.seconds(stage),
                )
                self.stages.keep(self.folder.client_stage(stage, job.client), job.adapter(), record)
                shutil.rmtree(own / job.client)

            for index, reason in self.dispatch.score(jobs, exchange, f"{stage}: evaluate", keep).items():
                refused[jobs[index].client] = reason
            self._pass_over(stage, [id for id in left if id in refused], refused, sent, len(left) == len(clients))

    def ended(self, id: str) -> Tensors:
        """What a client ended with alone; empty where it was not trained so, or refused."""
        path = self.folder.client_stage("local", id)
        return self.stages.state(path) if self.stages.has(path) else {}

    def _mix(
        self, number: int, clients: Sequence[str], own: Path, exchange: Exchange, refused: dict[str, str]
    ) -> dict[str, list[Mixture]]:
        """Each client's points by its own loss; what it chooses takes the place of what it trained, in `own`.

        Adds who has no scores to `refused`.
        """
        alone = {one.client for one in clients_of(self.stages.records(), "local")}
        parts = [part for part in self.config.own_parts if part != "local"]
        asked = [(id, at) for id in clients for at in points([*parts, "local"] if id in alone else parts)]
        jobs = [
            Job(id, self.members.block[id], partial(self._mixture, number, id, at, own), ((id, "validation"),))
            for id, at in asked
        ]
        losses: dict[int, Score] = {}

        def keep(index: int, scores: Sequence[Score]) -> None:
            losses[index] = scores[0]

        for index, reason in self.dispatch.score(jobs, exchange, "personal: choose", keep).items():
            refused[jobs[index].client] = reason
        found: dict[str, list[Mixture]] = {id: [] for id in clients if id not in refused}
        for index, (id, at) in enumerate(asked):
            if id in found:
                found[id].append(Mixture(weights=at, validation=losses[index].loss, stderr=losses[index].stderr))
        for id, curve in found.items():
            save_adapter_state(own / id, self._mixture(number, id, self._chosen(curve), own))
        return found

    def _chosen(self, found: Sequence[Mixture]) -> Weights:
        by_input = self.config.federation.personal == "by_input"
        return (choose_own if by_input else choose)(found).weights

    def _mixture(self, number: int, id: str, weights: Weights, own: Path) -> Tensors:
        """What a client has after round `number`, in `own` and alone, with these weights."""
        parts: dict[str, Callable[[], Tensors]] = {
            "global": partial(self.adapter, id, number),
            "personal": partial(load_adapter_state, own / id),
            "local": partial(self.ended, id),
        }
        return mixed([(weight, parts[part]()) for part, weight in weights.items()])

    def _pass_over(
        self,
        stage: Literal["local", "personal"],
        clients: Sequence[str],
        reasons: Mapping[str, str],
        sent: Mapping[str, Traffic],
        all_asked: bool,
    ) -> None:
        """Record who was refused outside the rounds. Raises `LegolmError` where it is everybody."""
        if all_asked and len(clients) == len(self.members.clients):
            raise UnusableRoundError(
                f"{stage}: every client was refused ({'; '.join(f'{id}: {reasons[id]}' for id in clients)})"
            )
        for id in clients:
            took = self.clock.seconds(stage)
            record = PassedRecord(phase=stage, client=id, reason=reasons[id], bytes=sent.get(id), seconds=took)
            self.stages.keep(self.folder.client_stage(stage, id), {}, record)
