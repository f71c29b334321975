"""What `results.py` reads: the folders of a study's runs, or the record that an earlier call made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field

from legolm.data import client_data, data_fingerprint
from legolm.errors import LegolmError, MissingDataError
from legolm.evaluation import compare
from legolm.evaluation.figure import RatioFigure, ratio_figure
from legolm.evaluation.floors import constant_guess
from legolm.federate.server import server_examples
from legolm.runs import (
    Ablation,
    Comparison,
    Data,
    Machine,
    Record,
    RunDir,
    Stage,
    Summary,
    best_round,
    clients_of,
    read_record,
    read_stages,
    rounds_of,
    traffic_of,
)
from legolm.system import atomic_write, read_json

DEFAULT, PLAIN, PERSONAL = "heteagg_near", "heteagg_frozen_side", "heteagg_personal"
LOCAL, FEDIT, RANK_4, MASKS = "local", "fedit_everyone", "fedit_rank_4", "heteagg_masks"
BENCHES = {
    "flan": DEFAULT,
    "warm": "heteagg_factor_warm",
    "languages": MASKS,
    "labels": DEFAULT,
    "paper": "sparsegpt-heterogeneous",
}
"""Each study's folder below RUNS, and the variant whose clients, data and settings stand for all."""
WHOLE = {DEFAULT, MASKS, PLAIN, PERSONAL, LOCAL, "alone", BENCHES["paper"], "wanda-heterogeneous"}
"""Variants of which tables and plots show clients one by one."""
PLACES = ("*/summary.json", "rates/*/*/summary.json", "seeds/*/*/summary.json", "seeds/*/*/*/summary.json")
FEW = 10
"""A task with at most so many different answers has labels."""
R = TypeVar("R", bound=BaseModel)


class Task(Record):
    """The LLM on one client's test answers: loss (nats an answer token), and the share that is exactly right."""

    loss: float
    exact_match: float


class Floor(Record):
    """What the best constant guess has on a client's test answers.

    `loss` (nats an answer token) is that of guessing each answer as often as it is among these very answers, which
    nobody knows before; None where the training answers are more than `FEW`, or lack one of them. `exact_match` is that
    of the most frequent of them; without labels that of the most frequent training answer.
    """

    loss: float | None
    exact_match: float


class Client(Record):
    """A client's block by stage, on its own and the others' test data."""

    id: str
    block: str
    own: dict[Stage, float]
    others: dict[Stage, float]

    def loss(self, data: Data) -> dict[Stage, float]:
        """By stage."""
        return self.own if data == "own" else self.others


class Round(Record):
    """Each client's block after a round: (own, others')."""

    round: int
    clients: dict[str, tuple[float, float | None]]


class Cost(Record):
    """What losses (nats) rise by without a block's clients, or without one client."""

    name: str
    kind: Literal["block", "client"]
    blocks: float
    llm: float


class LeftOut(Record):
    """`legolm ablate` of a run: the blocks' mean loss on all data with everyone, and what leaving out costs."""

    blocks: float
    costs: list[Cost]


class Run(Record):
    """One variant with one seed; `rank` is the adapter's largest.

    `rates` are validation losses by learning rate, where several were tried. `retrained` is what `left_out` is where
    the others trained again without whom was left out.

    The LLM's figures are those of the round that is best for it on validation data, the blocks' (`own`, `others`) those
    of the round that is best for them. Bytes are a client's in a round, both ways; `block_bytes` the same by block.
    Seconds: all of cutting and recovering blocks, and a client's training in a round. `data`: equal for equal data.
    """

    name: str
    seed: int
    rank: int
    rate: float
    rates: dict[str, float] = Field({})
    validation: float
    data: str
    codec: str
    machine: Machine
    precision: str
    llm_before: float
    llm: dict[str, Task]
    own: float
    others: float | None
    bytes: float
    block_bytes: dict[str, float]
    tokens: float
    flops: float | None
    cut_seconds: float
    train_seconds: float
    clients: list[Client] = Field([])
    history: list[Round] = Field([])
    left_out: LeftOut | None = None
    retrained: LeftOut | None = None

    @property
    def loss(self) -> float:
        """The LLM's, tasks counting the same."""
        return fmean(one.loss for one in self.llm.values())

    @property
    def exact_match(self) -> float:
        """The same of exact answers."""
        return fmean(one.exact_match for one in self.llm.values())

    def has(self, data: Data, stage: Stage) -> bool:
        """Whether every client has this stage on these data; not of one that shows no clients."""
        return bool(self.clients) and all(stage in one.loss(data) for one in self.clients)


class Setting(Record):
    """What all runs of a study share, but for what their names say."""

    model: str
    rounds: int
    steps: int
    batch_size: int
    test: int | None


class Bench(Record):
    """A study: its runs, and by seed the floors of each client's test answers, as its default variant has them.

    `gpu`: "" where there was none.
    """

    schema_number: Literal[2] = 2
    gpu: str
    setting: Setting
    floors: dict[int, dict[str, Floor]]
    runs: list[Run]


class Change(Record):
    """A figure of the LLM before and after, with the paired test of the difference."""

    before: float
    after: float
    difference: float
    stderr: float | None
    p: float
    test: str


class Evaluation(Record):
    """What `legolm eval` found, by task and metric."""

    schema_number: Literal[2] = 2
    figures: dict[str, Change]


def floor(train: Iterable[str], test: Sequence[str], tokens: float) -> Floor:
    """Of constant guesses on test answers with so many tokens together; training answers say whether there are labels.

    Where training answers are as many of each label, which of them is the majority is chance.
    """
    counts = Counter(train)
    if len(counts) <= FEW and set(test) <= counts.keys():
        nats, exact = constant_guess(test)
        return Floor(loss=nats / tokens, exact_match=exact)
    return Floor(loss=None, exact_match=test.count(counts.most_common(1)[0][0]) / len(test))


def read_bench(runs: Path, name: str, gpu: str = "") -> Bench | None:
    """A study's record in `runs`, or what its folder there has; None where it has no finished run.

    Of a variant's learning rates the one with the least loss on validation data counts. Raises `LegolmError` for runs
    of another version, and for data that are not there or no longer those of the runs.
    """
    if (runs / f"{name}.json").exists():
        return read_record(runs / f"{name}.json", Bench, "write it anew from the runs")
    folder = runs / name
    compared = folder / "compare.json"
    rows = read_record(compared, Comparison, "run the comparison again").rows if compared.exists() else []
    flops = {row.folder or row.name: row.flops for row in rows}
    tried: dict[tuple[int, str], dict[Path, Run]] = {}
    for path in (one.parent for pattern in PLACES for one in sorted(folder.glob(pattern))):
        run = read_run(path, flops.get(path.relative_to(folder).as_posix()))
        tried.setdefault((run.seed, run.name), {})[path] = run
    if not tried:
        return None
    chosen: dict[Path, Run] = {}
    for found in tried.values():
        path = min(found, key=lambda one: found[one].validation)
        rates = {f"{one.rate:g}": one.validation for one in found.values()} if len(found) > 1 else {}
        chosen[path] = found[path].model_copy(update={"rates": rates})
    standing = [path for path, run in chosen.items() if run.name == BENCHES[name]]
    config = RunDir([*standing, *chosen][0]).known()
    setting = Setting(
        model=config.model,
        rounds=config.federation.rounds,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        test=config.data.limit_test,
    )
    floors = {chosen[path].seed: floors_of(path) for path in standing}
    return rounded(Bench(gpu=gpu, setting=setting, floors=floors, runs=sorted(chosen.values(), key=_place)))


def _place(run: Run) -> tuple[str, int]:
    return run.name, run.seed


def read_run(path: Path, flops: float | None) -> Run:
    """What tables use of a finished run."""
    summary = read_record(path / "summary.json", Summary, "write it anew: legolm run --resume")
    config, records = RunDir(path).known(), read_stages(path / "metrics.jsonl")
    rounds, alone = rounds_of(records), clients_of(records, "local")
    mode = config.federation.mode
    stage: Stage = "local" if mode == "alone" else "global"
    best = best_round(rounds, "llm_validation")
    if best.llm is None or best.llm_validation is None or summary.llm.loss_before is None:
        raise LegolmError(f"run folder {path}: nobody scored its LLM; take evaluate.scores everyone")
    block_of = {one.id: one.block for one in summary.clients}
    sent = {id for record in rounds for id in record.bytes if id in block_of}
    trained = [one for record in rounds for one in record.train.values()]
    trained += [one.train for one in alone if one.train] if mode == "alone" else []
    others = [one.others[stage] for one in summary.clients if stage in one.others]
    whole = path.name in WHOLE
    return Run(
        name=path.name,
        seed=summary.seed,
        rank=config.lora.rank,
        rate=config.train.learning_rate,
        validation=fmean(one.validation for one in alone) if mode == "alone" else best.llm_validation,
        data=RunDir(path).identity().data_fingerprint[:8],
        codec=config.federation.codec,
        machine=summary.machine,
        precision=config.precision,
        llm_before=summary.llm.loss_before,
        llm={id: Task(loss=one.loss, exact_match=one.exact_match) for id, one in best.llm.root.items()},
        own=fmean(one.own[stage] for one in summary.clients if stage in one.own),
        others=fmean(others) if others else None,
        bytes=sum(traffic_of(rounds)),
        block_bytes={
            block: sum(traffic_of(rounds, {id for id in sent if block_of[id] == block}))
            for block in sorted({block_of[id] for id in sent})
        },
        tokens=sum(one.tokens for one in trained),
        flops=flops,
        cut_seconds=summary.seconds.get("blocks", 0.0),
        train_seconds=_mean(one.seconds for one in trained),
        clients=[Client(id=one.id, block=one.block, own=one.own, others=one.others) for one in summary.clients]
        if whole
        else [],
        history=[
            Round(round=one.round, clients={id: (it.own, it.others) for id, it in one.clients.items()})
            for one in summary.history
            if whole and one.scored
        ],
        left_out=_left_out(path / Ablation.file(retrained=False)),
        retrained=_left_out(path / Ablation.file(retrained=True)),
    )


def floors_of(path: Path) -> dict[str, Floor]:
    """Those of each client's test answers in a run, whose tokens the run counted. Raises `LegolmError` for others."""
    run, config = RunDir(path), RunDir(path).known()
    try:
        data = client_data(config)
    except MissingDataError as error:
        bring = f"bring it: {config.data.fetch}, or " if config.data.fetch else ""
        raise LegolmError(f"run folder {path}: {error}; {bring}go to the folder that holds it") from None
    if data_fingerprint(data, server_examples(config)) != run.identity().data_fingerprint:
        raise LegolmError(f"run folder {path}: the data changed since the run; its floors would be of other questions")
    asked = rounds_of(read_stages(path / "metrics.jsonl"))[0].llm
    assert asked is not None  # `read_run` has looked
    return {
        id: floor([one.wanted for one in held.train], [one.wanted for one in held.test], asked.root[id].tokens)
        for id, held in data.items()
        if id in asked.root
    }


def _left_out(path: Path) -> LeftOut | None:
    if not path.exists():
        return None
    found = read_record(path, Ablation, "delete it, and leave out again")
    blocks, llm = found.all.blocks, found.all.llm or 0.0  # it has one: `read_run` has looked
    costs = [
        Cost(name=one.name, kind=one.kind, blocks=one.blocks - blocks, llm=(one.llm or 0.0) - llm)
        for one in found.without
    ]
    return LeftOut(blocks=blocks, costs=costs)


def read_evaluation(path: Path) -> Evaluation | None:
    """Of `legolm eval BEFORE AFTER --out PATH`, or its record; None where there is neither."""
    if not path.exists():
        return None
    found: Mapping[str, Any] = read_json(path)
    if "results" not in found:
        return read_record(path, Evaluation, "write it anew: legolm eval --out")
    models = list(dict.fromkeys(one["model"] for one in found["results"]))
    if len(models) < 2:
        raise LegolmError(f"{path}: has {len(models)} model; give legolm eval the LLM before and after")
    figures: dict[str, list[RatioFigure]] = {}
    for model in models[:2]:
        for one in found["results"]:
            if one["model"] == model and "sums" in one:
                text = one["metric"] == "perplexity"
                name = "wikitext" if text else f"{one['task']} {one['metric']}"
                figure = ratio_figure(one["sums"], one.get("weights"), name, exponential=text)
                figures.setdefault(name, []).append(figure)
    changes = {}
    for name, (before, after) in ((name, pair) for name, pair in figures.items() if len(pair) == 2):
        if (paired := compare(after, before)) is not None:
            changes[name] = Change(before=before.value, after=after.value, **asdict(paired))
    return rounded(Evaluation(figures=changes))


def rounded(record: R) -> R:
    """The record with as many digits as it is kept with, so that a page is the same from it and from the runs."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        return [short(one) for one in value] if isinstance(value, list) else value

    return type(record).model_validate(short(record.model_dump(mode="json")))


def keep(record: BaseModel, path: Path) -> None:
    """Write a record, a run a line."""
    value = record.model_dump(mode="json", exclude_defaults=True) | {"schema_number": 2}
    runs = ",\n".join(json.dumps(one) for one in value.pop("runs", []))
    head = json.dumps(value)
    atomic_write(path, f'{head[:-1]}, "runs": [\n{runs}\n]}}\n' if runs else f"{head}\n")


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return fmean(known) if known else 0.0
