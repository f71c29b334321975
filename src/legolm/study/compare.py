"""Compare schemes: one config, several variants, one table (`legolm compare`).

Every variant is a run in its own folder, resumable as any other; blocks of the same recipe are cut once for all. All
train the same steps of the same batch size a client and round: tokens and bytes are what the runs counted, and where
budgets differ (fewer clients take part, more is sent) the table says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import product
from math import inf, isnan
from multiprocessing import active_children
from pathlib import Path
from statistics import fmean

from rich.console import Console

from legolm.config import (
    CRITERIA,
    SCHEMES,
    TRAINERS,
    BlockConfig,
    RunConfig,
    Variant,
    load_base,
    load_plugins,
    load_study,
)
from legolm.errors import LegolmError, UnusableRoundError
from legolm.federate.server import LLM
from legolm.pipeline import run
from legolm.plan import Parts, Plan, make_plan, parts_key, read_parts, upload_of
from legolm.report import write_comparison
from legolm.runs import (
    ClientRecord,
    CompareRow,
    Comparison,
    Point,
    RoundRecord,
    RunDir,
    Stage,
    Summary,
    best_round,
    clients_of,
    finished,
    lacking,
    on_all_data,
    passed_of,
    read_record,
    read_stages,
    rounds_of,
    traffic_of,
    validations,
)
from legolm.system import Progress, Spawning, check_room, end_with_parent, held_bytes

MAX_SEED = 2**63 - 1
Planned = Mapping[str, tuple[RunConfig, Plan]]
"""Runs by their folders below the comparison's."""


def compare(
    path: Path,
    out: Path,
    changes: Sequence[str] = (),
    models: bool = True,
    store: Path | None = None,
    seeds: int = 1,
    jobs: int = 1,
) -> Comparison:
    """Run every variant in `out`/<name>; write compare.json, compare.csv and compare.html.

    `changes` (`a.b=value`) override the run that the variants vary. Without `models` no variant writes its final ones.
    Comparisons with the same `store` (`out`/blocks if not given) share blocks. With more `seeds` every variant runs
    with so many, its own and the next ones, those in `out`/seeds/<seed>/<name>. A variant with `rates` first runs with
    each of them, in `out`/rates/<rate>/<name>; what counts, and goes on with other seeds in
    `out`/seeds/<seed>/<rate>/<name>, is the one with the least loss on validation data. A rate at which nothing can be
    learned is out. `jobs` run at once, each in a process of its own. Raises `LegolmError` for none of either.
    """
    for option, number in (("--seeds", seeds), ("--jobs", jobs)):
        if number < 1:
            raise LegolmError(f"{option} {number}: must be at least 1")
    planned = plans(path, changes, seeds)
    if jobs > 1:
        _check_known(jobs, planned)
    check_places(planned, path, out, models, seeds, store)
    searches: dict[str, list[str]] = {}
    for place in planned:
        if place.startswith("rates/"):
            searches.setdefault(Path(place).name, []).append(place)

    def waits(place: str) -> bool:
        return place.startswith("seeds/") and Path(place).name in searches

    def go(todo: Planned) -> dict[str, CompareRow]:
        # Measured here once: two processes might find another one faster.
        decided = {
            place: (config if RunDir(out / place).exists() else _with_precision(config, plan), plan)
            for place, (config, plan) in todo.items()
        }
        return _run_all(decided, out, jobs, store or out / "blocks", models, seeds)

    rows = go({place: one for place, one in planned.items() if not waits(place)})
    chosen: dict[str, str] = {}
    for name, places in searches.items():
        losses = tried({place: rows[place] for place in places if place in rows}, out)
        if not losses:
            rates = ", ".join(Path(place).parts[1] for place in places)
            raise LegolmError(
                f"variant {name}: nothing could be learned at any of its rates ({rates}); give lower ones"
            )
        chosen[name] = best = min(losses, key=lambda place: inf if isnan(losses[place]) else losses[place])
        searched = {Path(place).parts[1]: losses.get(place) for place in places}
        rows[best] = rows[best].model_copy(update={"searched": searched})
    settled: dict[str, tuple[RunConfig, Plan]] = {}
    for place, (config, plan) in planned.items():
        name = Path(place).name
        if waits(place):
            rate = rows[chosen[name]].learning_rate
            seeded = Path(place).with_name(f"{rate:g}") / name
            settled[seeded.as_posix()] = _at_rate(config, rate), plan
        elif chosen.get(name, place) == place:
            settled[place] = config, plan
    rows |= go({place: one for place, one in settled.items() if place not in rows})
    used = {place: RunDir(out / place).known().precision for place in settled}
    if len(set(used.values())) > 1:
        each = ", ".join(f"{place} {precision}" for place, precision in used.items())
        Progress().note(f"not all ran in one precision ({each}); set `precision`, in another --out, to compare alike")
    result = Comparison(name=path.stem, rows=[rows[place] for place in settled])
    result.write(out)
    write_comparison(result, out / "compare.html")
    return result


def _check_known(jobs: int, planned: Planned) -> None:
    """Raise `LegolmError` where a run needs what the user's script registered: other processes do not know it."""
    for config, _ in planned.values():
        methods = [(CRITERIA, block.method) for block in config.blocks]
        for registry, name in (SCHEMES, config.aggregate.scheme), (TRAINERS, config.train.trainer), *methods:
            if registry.of_script(name):
                raise LegolmError(
                    f"--jobs {jobs}: {registry.kind} {name!r} is defined in this script, and each run is a process of "
                    "its own; put it into a module that `plugins` names, or take one job"
                )


def check_places(
    planned: Planned, path: Path, out: Path, models: bool = True, seeds: int = 1, store: Path | None = None
) -> None:
    """Raise `LegolmError` unless all these runs have room in `out`, and what is there may go on with them.

    All first: bad input should not wait for the first run's end, nor another's folder or a small disk for the last.
    """
    check_room(out)
    check_room(store or out / "blocks", field="--blocks")
    if RunDir(out).exists():
        raise LegolmError(f"{out}: is the folder of a run; give another --out")
    table = out / "compare.json"
    if table.exists() and (there := read_record(table, Comparison).name) != path.stem:
        raise LegolmError(f"{out}: holds the comparison {there!r}, and this is {path.stem!r}; give another --out")
    blocks = [sum(block.file_bytes for block in plan.blocks) for _, plan in planned.values()]
    needed = sum(plan.disk_bytes - (0 if models else plan.models_bytes) for _, plan in planned.values())
    check_room(out, needed - sum(blocks) + seeds * max(blocks) - held_bytes(out))
    for place, (config, _) in planned.items():
        run_folder = RunDir(out / place)
        run_folder.check(run_folder.settled(config), resume=True)


def _with_precision(config: RunConfig, plan: Plan) -> RunConfig:
    return config.model_copy(update={"precision": plan.precision})


def _at_rate(config: RunConfig, rate: float) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})


def tried(found: Mapping[str, CompareRow], out: Path) -> dict[str, float]:
    """What a learning rate is chosen by, of each: the LLM's loss on validation data, the blocks' where there is none.

    Blocks' losses are means over the clients that have scores in each run of them.
    """
    if all(one.llm_validation is not None for one in found.values()):
        return {place: one.llm_validation for place, one in found.items() if one.llm_validation is not None}
    records = {place: read_stages(out / place / "metrics.jsonl") for place in found}
    without = {id for one in records.values() for id in lacking(one)}
    passed = {gone.client for one in records.values() for gone in passed_of(one)}
    chosen = {}
    for place, one in found.items():
        if one.mode != "alone":
            chosen[place] = min(validations(records[place], without).values())
            continue
        alone = {each.client: each.validation for each in clients_of(records[place], "local")}
        chosen[place] = fmean(loss for id, loss in alone.items() if id not in passed or passed >= alone.keys())
    return chosen


def _run_all(planned: Planned, out: Path, jobs: int, store: Path, models: bool, seeds: int) -> dict[str, CompareRow]:
    """Each run's figures, without those of learning rates at which nothing can be learned; `jobs` at once."""
    rows: dict[str, CompareRow] = {}

    def finish(place: str, result: Callable[[], CompareRow]) -> None:
        try:
            rows[place] = found = result()
        except UnusableRoundError as error:
            if not place.startswith("rates/"):
                raise LegolmError(f"{labels[place]}: {error}") from None
            Progress().note(f"{labels[place]}: {error}; this rate is out")
            return
        except LegolmError as error:
            raise LegolmError(f"{labels[place]}: {error}") from None
        llm = "" if found.llm is None else f"LLM {found.llm:.3f}, "
        others = "" if found.others is None else f", others' {found.others:.3f}"
        says = f"{labels[place]}: finished; loss on test data: {llm}blocks' own {found.own:.3f}{others}"
        Progress().say(says)

    labels = {}
    for number, (place, (config, _)) in enumerate(planned.items(), 1):
        whose = Path(place).name if seeds == 1 else f"{Path(place).name}, seed {config.seed}"
        whose += f", rate {config.train.learning_rate:g}" if place.startswith("rates/") else ""
        labels[place] = f"{whose} ({number} of {len(planned)})"
    left = sum(not finished(out / place) for place in planned)
    if (jobs := min(jobs, left)) < 2:  # each process imports for seconds
        for place, (config, plan) in planned.items():
            finish(place, partial(_run_one, out, place, config, plan, store, models, Progress(of=labels[place])))
        return rows
    others = active_children()
    with ProcessPoolExecutor(jobs, Spawning(), end_with_parent) as pool:
        asked = {
            pool.submit(_run_beside, out, place, config, plan, store, models, labels[place]): place
            for place, (config, plan) in planned.items()
        }
        try:
            for done in as_completed(asked):
                finish(asked[done], done.result)
        except BrokenProcessPool:
            raise LegolmError(
                f"--jobs {jobs}: a run's process was ended from outside, for want of memory perhaps; finished runs "
                "stay: run the same command again, with fewer jobs"
            ) from None
        except BaseException:  # another run's error, or an interrupt: what runs is resumed later
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise
    return rows


def _run_one(
    out: Path, place: str, config: RunConfig, plan: Plan, store: Path, models: bool, progress: Progress
) -> CompareRow:
    folder = out / place
    summary = run(config, folder, folder.exists(), progress, store=store, models=models)
    return row(place, config, plan, summary, folder)


def _run_beside(
    out: Path, place: str, config: RunConfig, plan: Plan, store: Path, models: bool, label: str
) -> CompareRow:
    """In a process of its own, whose stages are lines: bars of several would write over each other."""
    load_plugins(config.plugins)
    progress = Progress(Console(stderr=True, force_terminal=False), of=label)
    try:
        return _run_one(out, place, config, plan, store, models, progress)
    except UnusableRoundError:
        raise
    except LegolmError as error:  # a kind with more than its text might not come through to the other process
        raise LegolmError(str(error)) from None


def plans(path: Path, changes: Sequence[str] = (), seeds: int = 1) -> dict[str, tuple[RunConfig, Plan]]:
    """Config and plan of every variant and seed, by its folder below the comparison's, the first seed's its name.

    With `rates` the first seed has a folder for each. Raises `LegolmError` for whatever cannot work.
    """
    study, configs = load_study(path, changes)
    read: dict[str, Parts] = {}
    found = {}

    def parts_of(config: RunConfig) -> Parts:
        key = parts_key(config)
        if key not in read:  # variants mostly differ in the scheme
            read[key] = read_parts(config)
        return read[key]

    @cache
    def sent(number: int) -> dict[str, int]:
        """The bytes that each client of the run itself sends in a round."""
        base = load_base(path, changes)
        base = base.model_copy(update={"seed": base.seed + number})
        return {one.id: one.bytes_up for one in make_plan(base, parts_of(base)).clients}

    for number, variant in product(range(seeds), study.variants):
        config = configs[variant.name]
        if config.final is not None:
            raise LegolmError(f"final: is for one run, and {path} has several; take it out")
        seed = config.seed + number
        if seed > MAX_SEED:
            raise LegolmError(f"--seeds {seeds}: variant {variant.name} starts at seed {config.seed}; lower it")
        config = config.model_copy(update={"seed": seed})
        try:
            parts = parts_of(config)
            config = _prepared(config, variant, sent(number) if variant.match_bytes else None)
            plan = make_plan(config, parts)
        except LegolmError as error:
            raise LegolmError(f"variant {variant.name}: {error}") from None
        if number or not variant.rates:
            found[f"seeds/{seed}/{variant.name}" if number else variant.name] = config, plan
            continue
        for rate in variant.rates:
            found[f"rates/{rate:g}/{variant.name}"] = _at_rate(config, rate), plan
    return found


def row(place: str, config: RunConfig, plan: Plan, summary: Summary, folder: Path) -> CompareRow:
    """A variant's figures, from its summary and what it recorded in `folder`, `place` below the comparison's.

    Operations are `PlannedBlock.token_flops` for each token, and those of prompts that rows share are in each of them.
    """
    alone = config.federation.mode == "alone"
    phase: Stage = "local" if alone else "global"
    records = read_stages(folder / "metrics.jsonl")
    rounds, local = rounds_of(records), clients_of(records, "local")
    trained = [(one.client, 1, one.train) for one in local if alone and one.train]
    trained += [(id, record.tags.get(id, record.round), one) for record in rounds for id, one in record.train.items()]
    turns = {one.id: [one.block] for one in plan.clients} | {LLM: [LLM]}
    turns |= {one.id: one.blocks for one in config.clients if one.blocks}
    flops = {one.name: one.token_flops for one in plan.blocks} | {LLM: plan.llm_flops}
    memory = {one.id: one.training_bytes for one in plan.clients} | {LLM: plan.llm_bytes}
    up, down = traffic_of(rounds)
    return CompareRow(
        name=Path(place).name,
        folder=place,
        seed=config.seed,
        scheme=config.aggregate.scheme,
        settings=config.aggregate.settings,
        mode=config.federation.mode,
        codec=config.federation.codec,
        clients=len(summary.clients),
        learning_rate=config.train.learning_rate,
        rounds=summary.rounds,
        best_round=summary.best_round,
        llm_best_round=summary.llm.best_round,
        llm=summary.llm.loss_after,
        llm_before=summary.llm.loss_before,
        llm_exact_match=summary.llm.exact_match_after,
        own=fmean(client.own[phase] for client in summary.clients if phase in client.own),
        own_exact_match=fmean(
            client.own_exact_match[phase] for client in summary.clients if phase in client.own_exact_match
        ),
        others=_mean(client.others.get(phase) for client in summary.clients),
        others_exact_match=_mean(client.others_exact_match.get(phase) for client in summary.clients),
        validation=fmean(one.validation for one in local)
        if alone
        else min(validations(rounds, lacking(rounds)).values()),
        llm_validation=None if alone else best_round(rounds, "llm_validation").llm_validation,
        bytes_down=down,
        bytes_up=up,
        replies=sum(len(record.bytes) for record in rounds[1:]),
        tokens=sum(one.tokens for _, _, one in trained),
        flops=sum(one.tokens * flops[turns[id][(number - 1) % len(turns[id])]] for id, number, one in trained),
        memory=_mean(memory[id] for id, _, _ in trained),
        seconds=sum(record.seconds for record in rounds[1:]) or max((one.seconds for one in local), default=0.0),
        curve=_curve(summary, rounds, local if alone else ()),
    )


def _curve(summary: Summary, rounds: Sequence[RoundRecord], local: Sequence[ClientRecord]) -> list[Point]:
    """Losses by what was trained and sent so far; where each trains alone, `local` is what comes after the start."""
    count, tokens, sent, found = len(summary.clients), 0.0, 0, []
    scored = [set(entry.clients) for entry in summary.history if entry.scored]
    there = set.intersection(*scored) or set.union(*scored)  # the same in all points
    for record, entry in zip(rounds, summary.history, strict=True):
        tokens += sum(one.tokens for one in record.train.values())
        sent += sum(one.up + one.down for one in record.bytes.values())
        if not entry.scored:
            continue
        blocks = fmean(on_all_data(one.own, one.others, count) for id, one in entry.clients.items() if id in there)
        llm = None if entry.llm is None else entry.llm.loss
        found.append(Point(round=entry.round, tokens=tokens, bytes=sent, llm=llm, blocks=blocks))
    if local:
        blocks = fmean(
            on_all_data(one.own["local"], one.others.get("local"), count)
            for one in summary.clients
            if "local" in one.own
        )
        tokens = sum(one.train.tokens for one in local if one.train)
        found.append(Point(round=1, tokens=tokens, bytes=0, llm=None, blocks=blocks))
    return found


def _prepared(config: RunConfig, variant: Variant, sent: Mapping[str, int] | None) -> RunConfig:
    """The variant's block for all clients; `dense` need not be in the run.

    With `sent`, bytes by client, at ranks at which they send as many.
    """
    if variant.block is None:
        return config
    specs = {spec.name: spec for spec in config.blocks}
    if variant.block == "dense" and "dense" not in specs:
        specs["dense"] = BlockConfig(name="dense", method="dense")
    if variant.block not in specs:
        raise LegolmError(f"block {variant.block!r} is not one of {', '.join(specs)}")
    alike = {"block": variant.block, "blocks": None, "profile": None}
    clients = [client.model_copy(update=alike) for client in config.clients]
    # The other blocks would only be cut.
    config = config.model_copy(update={"clients": clients, "blocks": [specs[variant.block]]})
    if sent is None:
        return config
    upload, ranks = upload_of(config, variant.block), range(1, config.lora.rank + 1)
    matched = []
    for client in clients:
        if not (wanted := sent.get(client.id)):
            raise LegolmError(
                f"match_bytes: client {client.id!r} sends nothing in the run itself; take match_bytes out"
            )
        # The least that sends so much, or the one below.
        least = bisect_left(ranks, wanted, key=partial(upload, client))
        near = ranks[max(least - 1, 0) : least + 1]
        rank = min(near, key=lambda rank: abs(upload(client, rank) - wanted))
        matched.append(client.model_copy(update={"rank": rank}))
    return config.model_copy(update={"clients": matched})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
