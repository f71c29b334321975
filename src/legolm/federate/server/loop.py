"""The rounds of one run over any transport: before, local only, rounds, personal step; each a stage that is kept.

A stage leaves a folder with `adapter.safetensors` and `metrics.json` that appears only when it is whole (`rundir`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from legolm.adapter import Flat, Tensors, Update, concatenated, tensors_hash
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Block
from legolm.config import OutlierConfig, RunConfig
from legolm.errors import LegolmError
from legolm.federate.server.begin import start_factors
from legolm.federate.server.dispatch import Dispatch, Job, Order, Split, Trained
from legolm.federate.transport import Exchange, Reply, Request
from legolm.federate.wire import messages as wire
from legolm.runs import UPDATES, RunDir, Score
from legolm.system import Progress, atomic_folder, atomic_write, derive_seed, read_json

Record = dict[str, Any]
Criterion = Literal["validation", "llm_validation"]


class Rounds:
    """`blocks` are the cut blocks and the LLM by name, `block_of` the block's name of each client by id.

    Runs of the same data and blocks that give the same folder as `shared` score them before training once.
    """

    def __init__(
        self,
        folder: RunDir,
        config: RunConfig,
        run: str,
        blocks: dict[str, Block],
        block_of: dict[str, str],
        progress: Progress,
        shared: Path | None = None,
    ) -> None:
        self._folder, self._config, self._shared = folder, config, shared
        self._llm = blocks["llm"]
        self._clients = [client.id for client in config.clients]
        self._block = {id: blocks[name] for id, name in block_of.items()} | {wire.EVERYONE: self._llm}
        self._rank = {client.id: client.rank or config.lora.rank for client in config.clients}
        self._rank[wire.EVERYONE] = config.lora.rank
        self._dispatch = Dispatch(config, run, self._block, self._rank, progress)
        alone = config.aggregate.scheme == "local_only"
        self._rounds = 0 if alone else config.federation.rounds
        self._personal_steps = 0 if alone else config.federation.personal_steps

    def run(self, exchange: Exchange) -> None:
        """All that needs clients. Stages that are finished are passed over."""
        self._before(exchange)
        if self._config.evaluate.local_only:
            self._alone("local", 0, exchange)
        for number in range(1, self._rounds + 1):
            self._round(number, exchange)
        if self._personal_steps:
            self._alone("personal", self.best("validation"), exchange)

    @property
    def finished(self) -> bool:
        """Nothing that needs clients is left to do."""
        return all(path.exists() for path in self._stages())

    def records(self) -> list[Record]:
        """The metrics of every finished stage, in order."""
        return [read_json(path / "metrics.json") for path in self._stages() if path.exists()]

    def best(self, by: Criterion) -> int:
        """The finished round that is the best by this."""
        return int(best_round(self.records(), by)["round"])

    def final_factors(self, id: str | None) -> Tensors:
        """What a client (None: the LLM) ends with: its own last adapter if any, else its slice of its best round's."""
        if id is None:
            return self.scheme(self.best("llm_validation")).adapter(self._llm.coverage, self._config.lora.rank)
        if self._personal_steps or not self._rounds:
            stage = "personal" if self._personal_steps else "local"
            factors: Tensors = load_file(self._folder.client_stage(stage, id) / "adapter.safetensors")
            return factors
        return self.scheme(self.best("validation")).adapter(self._block[id].coverage, self._rank[id])

    def start_hash(self, number: int) -> str:
        """Of the global adapter after this round, from which a last training starts, in the LLM's coordinates."""
        return tensors_hash(self.scheme(number).adapter(self._llm.coverage, self._config.lora.rank))

    def replay(self, last: int, without: Collection[str]) -> Scheme:
        """The scheme after round `last` had these clients' kept updates not been added.

        The others' updates are what they were: what they trained from had the left-out ones in it.
        """
        scheme = self.scheme(0)
        for number in range(1, last + 1):
            accepted = read_json(self._folder.round(number) / "metrics.json")["accepted"]
            there = [id for id in accepted if id not in without]
            received = self.scheme(number - 1)
            for one in self._updates(number, there, received, self._kept(number), f"round {number}: replay"):
                if one.update is None:
                    raise LegolmError(f"round {number}: the kept update of {one.client}: {one.reason}")
                scheme.add(one.update, self._block[one.client].coverage)
            scheme.finish()
        return scheme

    def scheme(self, number: int | None) -> Scheme:
        """The scheme as it was after a finished round, or at the very start."""
        lora, seed = self._config.lora, derive_seed(self._config.seed, "adapter")
        factors = start_factors(self._config, self._llm)
        start = Start(self._llm.coverage.shape, factors, lora.rank, lora.scaling, seed)
        scheme = make_scheme(start, self._config.aggregate)
        if number is not None:
            scheme.load_state(load_file(self._folder.round(number) / "adapter.safetensors"))
        return scheme

    def score_global(self, scheme: Scheme, exchange: Exchange, label: str) -> Record:
        """The LLM and every distinct block with the global update, on all test data and on validation data.

        `validation` is the mean loss of the clients' blocks on their own, `llm_validation` the LLM's on all clients'.
        """
        tests: tuple[tuple[str, Split], ...] = tuple((id, "test") for id in self._clients)
        alike: dict[tuple[str, int], list[str]] = {(self._llm.name, self._config.lora.rank): []}
        for id in self._clients:
            name = self._llm.name if is_dense(self._block[id]) else self._block[id].name
            alike.setdefault((name, self._rank[id]), []).append(id)
        jobs: list[Job] = []
        for (name, rank), ids in alike.items():
            block = self._llm if name == self._llm.name else self._block[ids[0]]
            client, asked = (ids[0] if ids else self._clients[0]), (ids if jobs else self._clients)
            validation: tuple[tuple[str, Split], ...] = tuple((id, "validation") for id in asked)
            jobs.append(Job(client, block, scheme.adapter(block.coverage, rank), tests + validation))
        results: dict[int, Sequence[Score]] = {}
        self._dispatch.score(jobs, exchange, label, results.__setitem__)

        # Once for all who hold the same: with each client's own copy a record would grow with their square.
        held = [
            {"clients": ids, "scores": self._by_client(results[index])}
            for index, ids in enumerate(alike.values())
            if ids
        ]
        # In the jobs' order, not the replies': sums round by it.
        losses = [
            {id: score.loss for (id, split), score in zip(job.sets, results[index], strict=True) if split != "test"}
            for index, job in enumerate(jobs)
        ]
        own = [losses[index][id] for index, ids in enumerate(alike.values()) for id in ids]
        return {
            "llm": self._by_client(results[0]),
            "held": held,
            "validation": fmean(own),
            "llm_validation": fmean(losses[0].values()),
        }

    # Stages

    def _before(self, exchange: Exchange) -> None:
        """Round 0: the server's initial adapter, and every block and the LLM before fine-tuning."""
        if self._folder.round(0).exists():
            return
        began = time.perf_counter()
        scheme = self.scheme(None)
        record = {"stage": "round", "round": 0, "accepted": [], "refused": [], "train": {}, "bytes": {}}
        known = self._shared_scores()
        if known and known.exists():
            record |= read_json(known)
        else:
            scored = self.score_global(scheme, exchange, "before: evaluate")
            record |= scored
            if known:
                atomic_write(known, json.dumps(scored) + "\n")
        self._keep(self._folder.round(0), scheme.state(), record, began)

    def _round(self, number: int, exchange: Exchange) -> None:
        """Fine-tune the drawn clients' blocks, aggregate updates as they come, apply the global update, evaluate."""
        if self._folder.round(number).exists():
            return
        began = time.perf_counter()
        scheme, drawn = self.scheme(number - 1), self._draw(number)
        # Data at one place gives nobody's update.
        keeps = self._config.federation.keep_updates and drawn != [wire.EVERYONE]
        train: dict[str, Record] = {}
        refused: dict[str, str] = {}
        traffic: dict[str, dict[str, int]] = {}
        with atomic_folder(self._folder.round(number)) as folder:
            for one in self._updates(number, drawn, scheme, exchange, f"round {number}: train"):
                traffic[one.client] = {"up": one.bytes_up, "down": one.bytes_down}
                if one.update is None:
                    refused[one.client] = one.reason
                    continue
                scheme.add(one.update, self._block[one.client].coverage)
                train[one.client] = dict(one.update.metrics) | {"size": size_of(one.update)}
                if keeps:
                    (folder / UPDATES).mkdir(exist_ok=True)
                    (folder / UPDATES / f"{one.client}.safetensors").write_bytes(one.reply)
            # Replies came in any order; the record does not depend on it.
            accepted = [id for id in drawn if id in train]
            least = self._config.federation.min_replies
            if len(accepted) < min(least, len(drawn)):
                reasons = "; ".join(f"{id}: {refused[id]}" for id in drawn if id in refused)
                raise LegolmError(
                    f"round {number}: {len(accepted)} updates accepted, federation.min_replies is {least} ({reasons})"
                )
            scheme.finish()
            record: Record = {"stage": "round", "round": number, "accepted": accepted}
            record["refused"] = [{"client": id, "reason": refused[id]} for id in drawn if id in refused]
            record["train"] = {id: train[id] for id in accepted}
            # Data at one place travels no more.
            record["bytes"] = {id: traffic[id] for id in drawn if id in traffic and id != wire.EVERYONE}
            record |= self.score_global(scheme, exchange, f"round {number}: evaluate")
            _write(folder, scheme.state(), record, began)
        self._folder.write_metrics(self.records())

    def _updates(
        self, number: int, clients: Sequence[str], scheme: Scheme, exchange: Exchange, label: str
    ) -> Iterator[Trained]:
        """What clients return for round `number` of this run, checked; `scheme` is the one after the round before."""
        before = [one for one in self._rounds_so_far() if one["round"] < number]
        usual = usual_size(before)
        order = Order(clients, scheme, "round", number, last_accepted(before))
        for one in self._dispatch.train(order, exchange, label):
            if one.update is None:
                yield one
            else:
                update, reason = within(one.update, size_of(one.update), usual, self._config.aggregate.outliers)
                yield replace(one, update=update, reason=reason)

    def _alone(self, stage: Literal["local", "personal"], start: int, exchange: Exchange) -> None:
        """Train each client from round `start` without aggregation; score its block on every client's test data.

        `local` is the baseline: alone for every step that a client makes in the federation. `personal` is the last
        step: on from the best global update.
        """
        left = [id for id in self._clients if not self._folder.client_stage(stage, id).exists()]
        if not left:
            return
        began = time.perf_counter()
        scheme = self.scheme(start)
        own: dict[str, Tensors] = {}
        metrics: dict[str, Record] = {}
        for one in self._dispatch.train(Order(left, scheme, stage, start, {}), exchange, f"{stage}: train"):
            if one.update is None:
                raise LegolmError(f"{stage}: client {one.client}: {one.reason}")
            start_factors, delta = one.update.received, one.update.delta
            ended = {key: tensor + delta[key] if key in delta else tensor for key, tensor in start_factors.items()}
            own[one.client] = concatenated(ended, scheme.fold(self._block[one.client].coverage, 0))
            metrics[one.client] = dict(one.update.metrics)
        tests: tuple[tuple[str, Split], ...] = tuple((id, "test") for id in self._clients)
        jobs = [Job(id, self._block[id], own[id], (*tests, (id, "validation"))) for id in left]

        def keep(index: int, scores: Sequence[Score]) -> None:
            id = left[index]
            record: Record = {"stage": stage, "client": id, "scores": self._by_client(scores), "train": metrics[id]}
            record["validation"] = scores[-1].loss
            self._keep(self._folder.client_stage(stage, id), own[id], record, began)

        self._dispatch.score(jobs, exchange, f"{stage}: evaluate", keep)

    # Pieces

    def _draw(self, number: int) -> list[str]:
        """The clients of a round: those there, of whom a share is drawn from the run's seed."""
        federation = self._config.federation
        if self._config.aggregate.scheme == "centralized":
            return [wire.EVERYONE]
        there = [
            client.id
            for client in self._config.clients
            if client.there(number)
            if not federation.capable or is_dense(self._block[client.id])
        ]
        count = min(len(there), max(math.ceil(federation.fraction * len(there)), federation.min_replies))
        drawn = set(random.Random(derive_seed(self._config.seed, "draw", number)).sample(there, count))
        return [id for id in there if id in drawn]

    def _shared_scores(self) -> Path | None:
        """Where runs find each other's scores before training; nowhere for one that starts from a trained adapter."""
        config = self._config
        if self._shared is None or config.lora.start is not None or config.aggregate.start is not None:
            return None
        fields = {"model", "seed", "data", "precision", "device", "lora", "evaluate"}
        identity = read_json(self._folder.path / "run.json")
        what = [
            config.model_dump_json(include=fields, exclude={"evaluate": {"local_only"}}),
            config.train.max_length,
            config.train.long_examples,
            identity["base_fingerprint"],
            identity["data_fingerprint"],
            [(id, self._rank[id], (self._block[id].path / "manifest.json").read_text()) for id in self._clients],
        ]
        return self._shared / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"

    def _rounds_so_far(self) -> list[Record]:
        return [record for record in self.records() if record["stage"] == "round"]

    def _by_client(self, scores: Sequence[Score]) -> dict[str, Record]:
        """The first scores are those of every client's test data, in order."""
        return {id: one.model_dump() for id, one in zip(self._clients, scores, strict=False)}

    def _kept(self, number: int) -> Exchange:
        """Answers of round `number` from its folder."""

        def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            for index, request in enumerate(requests):
                try:
                    yield Reply(index, self._folder.update(number, request.client).read_bytes())
                except OSError as error:
                    yield Reply(index, error=str(error))

        return exchange

    def _keep(self, path: Path, adapter: Tensors, record: Record, began: float) -> None:
        """Make a stage's folder."""
        with atomic_folder(path) as folder:
            _write(folder, adapter, record, began)
        self._folder.write_metrics(self.records())

    def _stages(self) -> list[Path]:
        """Every stage's folder, in order."""
        paths = [self._folder.round(0)]
        if self._config.evaluate.local_only:
            paths += [self._folder.client_stage("local", id) for id in self._clients]
        paths += [self._folder.round(number) for number in range(1, self._rounds + 1)]
        if self._personal_steps:
            paths += [self._folder.client_stage("personal", id) for id in self._clients]
        return paths


def _write(folder: Path, adapter: Tensors, record: Record, began: float) -> None:
    """Fill a stage's folder. `seconds` counts from the stage's begin, also where clients share a stage."""
    save_file({key: tensor.contiguous() for key, tensor in adapter.items()}, folder / "adapter.safetensors")
    record = record | {"seconds": time.perf_counter() - began}
    (folder / "metrics.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def scores_of(record: Mapping[str, Any]) -> dict[str, dict[str, Record]]:
    """Of a record of `Rounds.score_global`: each client's block's scores, by client, on every client's test data."""
    return {id: one["scores"] for one in record["held"] for id in one["clients"]}


def best_round(records: Iterable[Mapping[str, Any]], by: Criterion) -> Mapping[str, Any]:
    """Of a run's records that of the round with the lowest loss on validation data, the earlier of equals.

    `validation` is the mean of the clients' blocks on their own data, `llm_validation` the LLM's on everyone's: where
    few clients train or blocks are far from the LLM, the two are best at different times.
    """
    return min((one for one in records if one["stage"] == "round"), key=lambda one: (one[by], one["round"]))


def is_dense(block: Block) -> bool:
    """Whether the block is the whole LLM."""
    return block.coverage.kept_weights == block.coverage.shape.layers * block.coverage.shape.layer_weights


def last_accepted(rounds: Iterable[Record]) -> dict[str, int]:
    """Each client's last round whose update was added."""
    return {id: record["round"] for record in rounds for id in record["accepted"]}


def usual_size(rounds: Iterable[Record]) -> float | None:
    """The median size of all updates so far; None without any."""
    sizes = [one["size"] for record in rounds for one in record["train"].values()]
    return median(sizes) if sizes else None


def size_of(update: Update) -> float:
    """Root mean square of the change: comparable between blocks."""
    parts = [update.delta.flat] if isinstance(update.delta, Flat) else list(update.delta.values())
    total = sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)
    return math.sqrt(total / sum(part.numel() for part in parts))


def within(update: Update, size: float, usual: float | None, outliers: OutlierConfig) -> tuple[Update | None, str]:
    """The update, scaled down or refused (None and the reason) when it is too large for the earlier rounds'."""
    if outliers.action == "none" or not usual or size <= outliers.factor * usual:
        return update, ""
    if outliers.action == "refuse":
        return None, f"size {size:.3g} is {size / usual:.1f} times the median of earlier rounds, {usual:.3g}"
    share = outliers.factor * usual / size
    return replace(update, delta={key: tensor * share for key, tensor in update.delta.items()}), ""
