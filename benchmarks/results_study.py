"""What follows from a study's runs: figures by variant over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from legolm.runs import Data, Stage
from results_read import DEFAULT, FEDIT, LOCAL, MASKS, PERSONAL, PLAIN, RANK_4, Bench, Client, Cost, Run

UNABLE = (FEDIT, RANK_4, "fedit_seconds", "heteagg_dense", LOCAL, "centralized")
"""What devices with narrow blocks cannot run, or no federation; all others but HeteAgg's are its peers."""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t: standard errors of a mean of so many values to each side of a 95 % interval."""


class Stat(NamedTuple):
    """A mean over seeds and its standard error, None with one seed; so many of these are a 95 % interval's half."""

    mean: float
    se: float | None
    half: float = 2.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat:
        """Of one value a seed."""
        known = list(values)
        if (count := len(known)) == 1:
            return cls(known[0], None)
        return cls(fmean(known), stdev(known) / count**0.5, T95.get(count, T95[max(T95)]))

    def shown(self, digits: int = 3, sign: str = "", scale: float = 1) -> str:
        """`mean ± se`."""
        more = "" if self.se is None else f" ± {self.se * scale:.{digits}f}"
        mean = round(self.mean * scale, digits) + 0.0  # no -0
        return f"{mean:{sign}.{digits}f}{more}"

    def beyond(self, limit: float = 0) -> bool | None:
        """Whether a limit is outside of the 95 % interval; None with one seed."""
        return None if self.se is None else abs(self.mean - limit) > self.half * self.se

    def named(self, name: str) -> dict[str, float | None]:
        """For JSON: `name` and `name_se`."""
        return {name: round(self.mean, 4), f"{name}_se": None if self.se is None else round(self.se, 4)}


class Study:
    """A bench's runs by variant and seed, and what follows from them."""

    def __init__(self, bench: Bench, more: Sequence[Run] = (), default: str = DEFAULT) -> None:
        self.bench, self.default = bench, default
        self.runs: dict[str, dict[int, Run]] = {}
        for run in [*bench.runs, *more]:
            self.runs.setdefault(run.name, {})[run.seed] = run
        floors = bench.floors.values()
        self.labels = [id for id in next(iter(floors), {}) if all(one[id].loss is not None for one in floors)]
        """Tasks with few different answers."""

    @property
    def every(self) -> list[Run]:
        """All runs."""
        return [run for found in self.runs.values() for run in found.values()]

    def over(self, name: str, of: Callable[[Run], float]) -> Stat:
        """A figure of a variant."""
        return Stat.of(map(of, self.runs[name].values()))

    def paired(self, name: str) -> Stat | None:
        """The LLM's loss with the default minus that with a variant, by seed; None without a seed of the same data."""
        both = self.both(name)
        return Stat.of(ours.loss - theirs.loss for ours, theirs in both) if both else None

    def both(self, name: str) -> list[tuple[Run, Run]]:
        """Runs of the default, each with the variant's of its seed and data."""
        ours, theirs = self.runs.get(self.default, {}), self.runs[name]
        seeds = sorted(ours.keys() & theirs.keys())
        return [(ours[seed], theirs[seed]) for seed in seeds if ours[seed].data == theirs[seed].data]

    def elsewhere(self, name: str) -> bool:
        """Whether a pair with a variant ran on two processors, or in two precisions."""
        pairs = self.both(name)
        return any((a.machine.cpu, a.precision) != (b.machine.cpu, b.precision) for a, b in pairs)

    def labelled(self, name: str) -> bool:
        """Whether a variant's LLM answers the tasks with labels, on the default's data where both have a seed."""
        ours, theirs = self.runs.get(self.default, {}), self.runs[name].values()
        there = all(set(self.labels) <= run.llm.keys() for run in theirs)
        return bool(self.labels) and there and all(run.data == ours.get(run.seed, run).data for run in theirs)

    def label_loss(self, run: Run) -> float:
        """The LLM's on tasks with labels."""
        return fmean(run.llm[id].loss for id in self.labels)

    def label_accuracy(self, run: Run) -> float:
        """The same of exact answers."""
        return fmean(run.llm[id].exact_match for id in self.labels)

    def floor(self, key: str, tasks: Sequence[str]) -> Stat:
        """The label prior (`loss`) or the majority class (`exact_match`), mean over tasks."""
        return Stat.of(fmean(getattr(one[id], key) for id in tasks) for one in self.bench.floors.values())

    def above_floor(self, key: str, of: Callable[[Run], float]) -> Stat:
        """The default's figure on tasks with labels minus their floor, by seed."""
        runs, floors = self.runs[self.default], self.bench.floors
        return Stat.of(
            of(runs[seed]) - fmean(getattr(floors[seed][id], key) for id in self.labels)
            for seed in sorted(runs.keys() & floors.keys())
        )

    @property
    def order(self) -> list[str]:
        """Variants, the LLM with the least loss first."""
        return sorted(self.runs, key=lambda name: self.over(name, lambda run: run.loss).mean)

    @property
    def ends(self) -> str | None:
        """The variant whose clients' ends count: the default, or that which is like it but for them."""
        ended = (name for name in (self.default, PERSONAL) if name in self.runs and self.has(name, "personal"))
        return next(ended, None)

    @property
    def alone(self) -> str:
        """The variant whose clients trained alone best on their own data: that of their ends, or `local`, which has its
        own rate; the paper's is called so."""
        told = [name for name in (self.ends, LOCAL) if name in self.runs and self.has(name, "local")]
        return min(told, key=lambda name: self.stage(name, "own", "local").mean, default="alone")

    def has(self, name: str, stage: Stage) -> bool:
        """Whether every client of a variant has this stage."""
        clients = [one for run in self.runs[name].values() for one in run.clients]
        return bool(clients) and all(stage in one.own for one in clients)

    @property
    def peers(self) -> list[str]:
        """Variants that the same devices can run: masked blocks take the LLM's memory and time in training."""
        unable = [name for name in UNABLE if name not in (FEDIT, RANK_4) or self.default != MASKS]
        return [name for name in self.order if not name.startswith("heteagg") and name not in unable]

    def clients(self, name: str) -> dict[str, list[Client]]:
        """A variant's clients, one of each seed, by id."""
        found: dict[str, list[Client]] = {}
        for run in self.runs.get(name, {}).values():
            for client in run.clients:
                found.setdefault(client.id, []).append(client)
        return found

    def stages(self, name: str, data: Data, stage: Stage) -> dict[int, float]:
        """Mean over clients' blocks of a variant, by seed."""
        runs = self.runs[name].items()
        return {seed: fmean(one.loss(data)[stage] for one in run.clients) for seed, run in runs}

    def stage(self, name: str, data: Data, stage: Stage) -> Stat:
        """The same over seeds."""
        return Stat.of(self.stages(name, data, stage).values())

    def bytes(self, name: str) -> float:
        """MB a client and round, both ways."""
        return self.over(name, lambda run: run.bytes).mean / 1e6


def figures(study: Study) -> dict[str, Any]:
    """A bench's part of `docs/results.json`."""
    main: dict[str, Any] = {}
    for name in study.order:
        main[name] = {
            **study.over(name, lambda run: run.loss).named("loss"),
            **study.over(name, lambda run: run.exact_match).named("accuracy"),
            "bytes": round(study.over(name, lambda run: run.bytes).mean),
            "seeds": sorted(study.runs[name]),
        }
        if study.labelled(name):
            main[name] |= study.over(name, study.label_loss).named("label_loss")
            main[name] |= study.over(name, study.label_accuracy).named("label_accuracy")
    found: dict[str, Any] = {"default_scheme": study.default, "main": main, "floor": floor(study), "paired": {}}
    first = study.default if study.default in study.runs else study.order[0]
    found["before"] = study.over(first, lambda run: run.llm_before).named("loss")
    for name in study.order:
        if name != study.default and (pair := study.paired(name)) is not None:
            found["paired"][name] = {"difference": round(pair.mean, 4), "se": pair.named("")["_se"]}
    if study.ends:
        found["personal"] = personal(study, study.ends)
    if omitted := omission(study):
        found["omission"] = omitted
    return found


def floor(study: Study) -> dict[str, Any]:
    """What constant guesses have on the tasks with labels: the label prior, and the majority class."""
    if not study.labels:
        return {"tasks": [], "loss": None, "accuracy": None}
    loss, most = study.floor("loss", study.labels), study.floor("exact_match", study.labels)
    return {"tasks": study.labels, **loss.named("loss"), **most.named("accuracy")}


def personal(study: Study, ends: str) -> dict[str, Any]:
    """What clients end with in a variant, means over clients.

    Beside it the global update, and trained alone: in the same run, or `local` with its own rate, whichever is better.
    """
    shared, own = study.stage(ends, "others", "global"), study.stage(ends, "own", "personal")
    ratios = personal_ratios(study, ends, study.alone)
    worst = max(ratios, key=lambda id: ratios[id])
    return {
        **own.named("own"),
        **study.stage(study.alone, "own", "local").named("own_alone"),
        **study.stage(ends, "others", "personal").named("others"),
        **shared.named("others_global"),
        "worst_client_ratio": round(ratios[worst], 4),
        "worst_client": worst,
        "alone": study.alone,
    }


def personal_ratios(study: Study, ends: str, alone: str) -> dict[str, float]:
    """Each client's personal loss on its own data in a variant over that of training alone in another, both means over
    seeds."""

    def mean(name: str, id: str, stage: Stage) -> float:
        return fmean(one.own[stage] for one in study.clients(name)[id])

    return {id: mean(ends, id, "personal") / mean(alone, id, "local") for id in study.clients(ends)}


def omission(study: Study) -> dict[str, Any] | None:
    """What leaving out each block costs the blocks, beside what the global update brings over training alone."""
    runs: list[Run] = []
    for of in (study.default, PLAIN):
        runs = runs or [run for run in study.runs.get(of, {}).values() if run.left_out]
    if not runs:
        return None
    found: dict[str, Any] = {"of": runs[0].name, "seeds": [run.seed for run in runs], "gain": None}
    alone = {run.seed: run for name in (PERSONAL, LOCAL) for run in study.runs.get(name, {}).values()}
    alone |= {run.seed: run for run in runs if any("local" in one.own for one in run.clients)}  # the very blocks
    if all(run.seed in alone for run in runs):
        gains = [on_all_data(alone[run.seed].clients) - run.left_out.blocks for run in runs if run.left_out]
        found |= Stat.of(gains).named("gain")
    for key, kind in (("cost", "block"), ("cost_clients", "client")):
        costs: dict[str, list[Cost]] = {}
        for one in (one for run in runs if run.left_out for one in run.left_out.costs if one.kind == kind):
            costs.setdefault(one.name, []).append(one)
        found[key] = {name: round(fmean(one.blocks for one in same), 4) for name, same in costs.items()}
        found[f"{key}_llm"] = {name: round(fmean(one.llm for one in same), 4) for name, same in costs.items()}
    return found


def on_all_data(clients: Sequence[Client]) -> float:
    """Mean loss of blocks that trained alone, on everyone's data."""
    count = len(clients)
    return fmean((one.own["local"] + (count - 1) * one.others["local"]) / count for one in clients)
