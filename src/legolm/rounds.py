"""The rounds of one run over any transport: before, local only, rounds, personal step; each a stage that is kept.

A stage leaves a folder with `adapter.safetensors` and `metrics.json` that appears only when it is whole (`rundir`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from legolm import wire
from legolm.aggregate import Scheme, make_scheme
from legolm.config import RunConfig
from legolm.coverage import init_factors
from legolm.federate import Exchange, Request
from legolm.finetune import load_adapter
from legolm.progress import Progress
from legolm.rundir import RunDir, atomic_folder, read_json
from legolm.types import Block, GlobalAdapter, LegolmError, Score, Tensors, Update

Record = dict[str, Any]
Phase = Literal["round", "local", "personal"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Job:
    """Score one block with one adapter, on behalf of a client, on (client, split) pairs."""

    client: str
    block: Block
    rank: int
    factors: Tensors
    sets: tuple[tuple[str, Split], ...]


@dataclass(frozen=True)
class Trained:
    """What came back from one client: its update, or why there is none; bytes of the request and of the reply."""

    client: str
    received: Tensors
    update: Update | None
    reason: str
    bytes_down: int
    bytes_up: int


class Rounds:
    """`blocks` are the cut blocks and the LLM by name, `block_of` the block's name of each client by id."""

    def __init__(
        self,
        folder: RunDir,
        config: RunConfig,
        run: str,
        blocks: dict[str, Block],
        block_of: dict[str, str],
        progress: Progress,
    ) -> None:
        self._folder, self._config, self._run = folder, config, run
        self._llm = blocks["llm"]
        self._progress = progress
        self._block = {id: blocks[name] for id, name in block_of.items()}
        self._rank = {client.id: client.rank or config.lora.rank for client in config.clients}
        self._clients = [client.id for client in config.clients]

    def run(self, exchange: Exchange) -> None:
        """All that needs clients. Stages that are finished are passed over."""
        self._before(exchange)
        if self._config.evaluate.local_only:
            self._local_only(exchange)
        for number in range(1, self._config.federation.rounds + 1):
            self._round(number, exchange)
        if self._config.federation.personal_steps:
            self._personal(exchange)

    @property
    def finished(self) -> bool:
        """Nothing that needs clients is left to do."""
        return all(path.exists() for path in self._stages())

    def records(self) -> list[Record]:
        """The metrics of every finished stage, in order."""
        return [read_json(path / "metrics.json") for path in self._stages() if path.exists()]

    def best(self) -> int:
        """The finished round with the lowest mean loss on the clients' validation data; the earlier of equals."""
        finished = [record for record in self.records() if record["stage"] == "round"]
        return int(min((record["validation"], record["round"]) for record in finished)[1])

    def final_factors(self, id: str | None) -> Tensors:
        """What a client (None: the LLM) ends with: its personal adapter, else its slice of the best round's."""
        if id is None:
            return self._scheme(self.best()).payload(self._llm.coverage, self._config.lora.rank)
        if self._config.federation.personal_steps:
            factors: Tensors = load_file(self._folder.client_stage("personal", id) / "adapter.safetensors")
            return factors
        return self._scheme(self.best()).payload(self._block[id].coverage, self._rank[id])

    # Stages

    def _before(self, exchange: Exchange) -> None:
        """Round 0: the server's initial adapter, and every block and the LLM before fine-tuning."""
        if self._folder.round(0).exists():
            return
        began = time.perf_counter()
        scheme = self._scheme(None)
        record = {"stage": "round", "round": 0, "accepted": [], "refused": [], "train": {}, "bytes": {}}
        record |= self._score_global(scheme, exchange, "before: evaluate")
        self._keep(self._folder.round(0), scheme.state(), record, began)

    def _round(self, number: int, exchange: Exchange) -> None:
        """Fine-tune every client's block, aggregate updates as they come, apply the global update, evaluate."""
        if self._folder.round(number).exists():
            return
        began = time.perf_counter()
        scheme = self._scheme(number - 1)
        found: dict[str, Trained] = {}
        for one in self._train(self._clients, scheme, "round", number, exchange):
            if one.update is not None:
                scheme.add(one.update, self._block[one.client].coverage)
            found[one.client] = one
        # Replies came in any order; the record does not depend on it.
        replies = [found[id] for id in self._clients]
        accepted = {one.client: one.update for one in replies if one.update is not None}
        refused = [{"client": one.client, "reason": one.reason} for one in replies if one.update is None]
        least = self._config.federation.min_replies
        if len(accepted) < least:
            reasons = "; ".join(f"{one['client']}: {one['reason']}" for one in refused)
            raise LegolmError(
                f"round {number}: {len(accepted)} updates accepted, federation.min_replies is {least} ({reasons})"
            )
        scheme.finish()
        record: Record = {"stage": "round", "round": number, "accepted": list(accepted), "refused": refused}
        record["train"] = {id: dict(update.metrics) for id, update in accepted.items()}
        record["bytes"] = {one.client: {"up": one.bytes_up, "down": one.bytes_down} for one in replies}
        record |= self._score_global(scheme, exchange, f"round {number}: evaluate")
        self._keep(self._folder.round(number), scheme.state(), record, began)

    def _local_only(self, exchange: Exchange) -> None:
        """The baseline: each client trains its block alone, for every step that it makes in the federation."""
        self._alone("local", 0, exchange)

    def _personal(self, exchange: Exchange) -> None:
        """The last step: each client trains on from the best global update and keeps the result."""
        self._alone("personal", self.best(), exchange)

    def _alone(self, stage: Literal["local", "personal"], start: int, exchange: Exchange) -> None:
        """Train each client from round `start` without aggregation; score its block on every client's test data."""
        left = [id for id in self._clients if not self._folder.client_stage(stage, id).exists()]
        if not left:
            return
        began = time.perf_counter()
        own: dict[str, Tensors] = {}
        metrics: dict[str, Record] = {}
        for one in self._train(left, self._scheme(start), stage, start, exchange):
            if one.update is None:
                raise LegolmError(f"{stage}: client {one.client}: {one.reason}")
            own[one.client] = {key: tensor + one.update.delta[key] for key, tensor in one.received.items()}
            metrics[one.client] = dict(one.update.metrics)
        tests: tuple[tuple[str, Split], ...] = tuple((id, "test") for id in self._clients)
        jobs = [Job(id, self._block[id], self._rank[id], own[id], tests) for id in left]

        def keep(index: int, scores: Sequence[Score]) -> None:
            id = left[index]
            record = {"stage": stage, "client": id, "scores": self._by_client(scores), "train": metrics[id]}
            self._keep(self._folder.client_stage(stage, id), own[id], record, began)

        self._score(jobs, exchange, f"{stage}: evaluate", keep)

    # Pieces

    def _train(
        self,
        clients: Sequence[str],
        scheme: Scheme,
        phase: Phase,
        number: int,
        exchange: Exchange,
    ) -> Iterator[Trained]:
        """Send each client its slice of the global adapter; give its checked update, or why not, as replies come."""
        steps, done, total = self._steps(phase, number)
        # Dearest first, so that no actor is left with the longest job at the end.
        order = sorted(clients, key=lambda id: -self._block[id].parameters)
        sent = {id: scheme.payload(self._block[id].coverage, self._rank[id]) for id in order}
        asked = {
            id: wire.TrainRequest(
                **self._header(id, self._block[id], self._rank[id]),
                phase=phase,
                round=number,
                steps=steps,
                done=done,
                total=total,
                seed=derive_seed(self._config.seed, phase, number, id),
            )
            for id in order
        }
        requests = [Request(id, wire.pack(asked[id], sent[id])) for id in order]
        label = f"round {number}: train" if phase == "round" else f"{phase}: train"
        with self._progress.stage(label, len(requests)) as advance:
            for reply in exchange(requests):
                id = order[reply.index]
                update, reason = None, reply.error
                if not reason:
                    try:
                        update = wire.accept(reply.content, asked[id], sent[id], self._block[id].coverage)
                    except LegolmError as error:
                        reason = str(error)
                yield Trained(id, sent[id], update, reason, len(requests[reply.index].content), len(reply.content))
                advance(1)

    def _steps(self, phase: Phase, number: int) -> tuple[int, int, int]:
        """(steps to make now, steps made before, steps in all) of a client."""
        each, rounds = self._config.train.steps, self._config.federation.rounds
        total = rounds * each + self._config.federation.personal_steps
        if phase == "round":
            return each, (number - 1) * each, total
        return (total, 0, total) if phase == "local" else (total - rounds * each, rounds * each, total)

    def _score_global(self, scheme: Scheme, exchange: Exchange, label: str) -> Record:
        """The LLM and every distinct block with the global update, on all test and its clients' validation data."""
        tests: tuple[tuple[str, Split], ...] = tuple((id, "test") for id in self._clients)
        whole = scheme.payload(self._llm.coverage, self._config.lora.rank)
        jobs = [Job(self._clients[0], self._llm, self._config.lora.rank, whole, tests)]
        alike: dict[tuple[str, int], list[str]] = {}
        for id in self._clients:
            alike.setdefault((self._block[id].name, self._rank[id]), []).append(id)
        for (_, rank), ids in alike.items():
            block = self._block[ids[0]]
            validation: tuple[tuple[str, Split], ...] = tuple((id, "validation") for id in ids)
            jobs.append(Job(ids[0], block, rank, scheme.payload(block.coverage, rank), tests + validation))
        results: dict[int, Sequence[Score]] = {}
        self._score(jobs, exchange, label, results.__setitem__)

        record: Record = {"llm": self._by_client(results[0]), "clients": {}}
        losses: list[float] = []
        for index, ids in enumerate(alike.values(), start=1):
            record["clients"] |= dict.fromkeys(ids, self._by_client(results[index]))
            losses += [one.loss for one in results[index][len(tests) :]]
        return record | {"validation": sum(losses) / len(losses)}

    def _score(
        self, jobs: Sequence[Job], exchange: Exchange, label: str, keep: Callable[[int, Sequence[Score]], None]
    ) -> None:
        """Send jobs, dearest first, and hand each job's scores to `keep` as they come. Raises `LegolmError`."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].block.parameters)
        requests = []
        for job in (jobs[i] for i in order):
            header = wire.EvaluateRequest(**self._header(job.client, job.block, job.rank), sets=list(job.sets))
            requests.append(Request(job.client, wire.pack(header, job.factors)))
        with self._progress.stage(label, len(jobs)) as advance:
            for reply in exchange(requests):
                if reply.error:
                    raise LegolmError(f"{label}: {reply.error}")
                scores, _ = wire.unpack(reply.content, wire.ScoreReply)
                keep(order[reply.index], scores.scores)
                advance(1)

    def _scheme(self, number: int | None) -> Scheme:
        """The scheme as it was after a finished round, or at the very start."""
        lora = self._config.lora
        seed = derive_seed(self._config.seed, "adapter")
        factors = init_factors(self._llm.coverage.shape, lora.targets, lora.rank, seed, lora.ranks)
        if lora.start and number is None:
            factors = load_adapter(Path(lora.start).expanduser(), factors, self._llm.coverage.shape, lora.scaling)
        untouched = {key: torch.zeros_like(tensor) for key, tensor in factors.items()}
        scheme = make_scheme(GlobalAdapter(factors, untouched, lora.rank, lora.scaling), self._config.aggregate)
        if number is not None:
            scheme.load_state(load_file(self._folder.round(number) / "adapter.safetensors"))
        return scheme

    def _header(self, id: str, block: Block, rank: int) -> Record:
        return {
            "run": self._run,
            "client": id,
            "block": block.name,
            "base_fingerprint": block.base_fingerprint,
            "coverage_hash": block.coverage.hash,
            "rank": rank,
            "scale": self._config.lora.scaling,
        }

    def _by_client(self, scores: Sequence[Score]) -> dict[str, Record]:
        """The first scores are those of every client's test data, in order."""
        return {id: asdict(one) for id, one in zip(self._clients, scores, strict=False)}

    def _keep(self, path: Path, adapter: Tensors, record: Record, began: float) -> None:
        """Make a stage's folder. `seconds` counts from the stage's begin, also where clients share a stage."""
        with atomic_folder(path) as folder:
            save_file(adapter, folder / "adapter.safetensors")
            record = record | {"seconds": time.perf_counter() - began}
            (folder / "metrics.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._folder.write_metrics(self.records())

    def _stages(self) -> list[Path]:
        """Every stage's folder, in order."""
        federation = self._config.federation
        paths = [self._folder.round(0)]
        if self._config.evaluate.local_only:
            paths += [self._folder.client_stage("local", id) for id in self._clients]
        paths += [self._folder.round(number) for number in range(1, federation.rounds + 1)]
        if federation.personal_steps:
            paths += [self._folder.client_stage("personal", id) for id in self._clients]
        return paths


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the run's seed and what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
