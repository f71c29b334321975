"""What follows from a study's runs: figures by variant over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from legolm.runs import Data, Stage, on_all_data
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


class Pair(NamedTuple):
    """Two figures over the seeds that both have, and the first minus the second."""

    ours: Stat
    theirs: Stat
    difference: Stat

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Pair | None:
        """Of values by seed; None without a common one."""
        both = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if not both:
            return None
        left, right = zip(*both, strict=True)
        return cls(Stat.of(left), Stat.of(right), Stat.of(mine - other for mine, other in both))

    @property
    def ratio(self) -> float:
        """The first mean over the second."""
        return self.ours.mean / self.theirs.mean

    def shown(self) -> str:
        """Both means, and their ratio."""
        return f"{self.ours.mean:.3f} / {self.theirs.mean:.3f} = {self.ratio:.2f}"

    @property
    def single(self) -> bool:
        """Whether by one seed."""
        return self.difference.se is None


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

    def floor(self, key: Literal["loss", "exact_match"]) -> dict[int, float]:
        """The label prior or the majority class, mean over tasks with labels, by seed."""
        return {seed: fmean(getattr(one[id], key) for id in self.labels) for seed, one in self.bench.floors.items()}

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
        if len(told) < 2:
            return told[0] if told else "alone"
        both = Pair.of(*(self.stages(name, "own", "local") for name in told))
        return told[both is not None and both.difference.mean > 0]

    def has(self, name: str, stage: Stage) -> bool:
        """Whether every client of a variant has this stage."""
        return all(run.has("own", stage) for run in self.runs[name].values())

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
        """Mean over clients' blocks of a variant, by seed; without those in which some client lacks this stage."""
        runs = self.runs.get(name, {}).items()
        return {seed: fmean(one.loss(data)[stage] for one in run.clients) for seed, run in runs if run.has(data, stage)}

    def by_client(self, name: str, data: Data, stage: Stage) -> dict[str, dict[int, float]]:
        """Each client's block of a variant, by seed."""
        found: dict[str, dict[int, float]] = {}
        for seed, run in self.runs.get(name, {}).items():
            for one in run.clients:
                if stage in one.loss(data):
                    found.setdefault(one.id, {})[seed] = one.loss(data)[stage]
        return found

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
    loss, most = Stat.of(study.floor("loss").values()), Stat.of(study.floor("exact_match").values())
    return {"tasks": study.labels, **loss.named("loss"), **most.named("accuracy")}


def personal(study: Study, ends: str) -> dict[str, Any]:
    """What clients end with in a variant, means over clients.

    Beside it the global update, and trained alone: in the same run, or `local` with its own rate, whichever is better.
    """
    found: dict[str, Any] = {}
    if own := beside_alone(study, ends):
        found |= {**own.ours.named("own"), **own.theirs.named("own_alone")}
    if others := beside_global(study, ends):
        found |= {**others.ours.named("others"), **others.theirs.named("others_global")}
    if ratios := personal_ratios(study, ends):
        worst = max(ratios, key=lambda id: ratios[id])
        found |= {"worst_client_ratio": round(ratios[worst], 4), "worst_client": worst, "alone": study.alone}
    return found


def beside_alone(study: Study, ends: str) -> Pair | None:
    """Clients' personal loss on their own data in a variant, and that of training alone."""
    return Pair.of(study.stages(ends, "own", "personal"), study.stages(study.alone, "own", "local"))


def beside_global(study: Study, ends: str) -> Pair | None:
    """Clients' personal loss on the others' data in a variant, and that of the global update."""
    return Pair.of(study.stages(ends, "others", "personal"), study.stages(ends, "others", "global"))


def personal_ratios(study: Study, ends: str) -> dict[str, float]:
    """Each client's personal loss on its own data in a variant over that of training alone, both means over seeds."""
    alone = study.by_client(study.alone, "own", "local")
    pairs = {id: Pair.of(own, alone.get(id, {})) for id, own in study.by_client(ends, "own", "personal").items()}
    return {id: pair.ratio for id, pair in pairs.items() if pair}


def omission(study: Study) -> dict[str, Any] | None:
    """What leaving out each block costs the blocks, beside what the global update brings over training alone; replayed,
    and trained again (`_retrained`)."""
    runs: list[Run] = []
    for name in (study.default, PLAIN):
        runs = runs or [run for run in study.runs.get(name, {}).values() if run.left_out]
    if not runs:
        return None
    found: dict[str, Any] = {"of": runs[0].name, "seeds": [run.seed for run in runs], "gain": None}
    others = [run for name in (PERSONAL, LOCAL) for run in study.runs.get(name, {}).values()]
    alone = {
        run.seed: fmean(on_all_data(one.own["local"], one.others.get("local"), len(run.clients)) for one in run.clients)
        for run in (*others, *runs)  # last the very blocks, which are the best to compare with
        if run.has("own", "local")
    }
    if all(run.seed in alone for run in runs):
        gains = [alone[run.seed] - run.left_out.blocks for run in runs if run.left_out]
        found |= Stat.of(gains).named("gain")
    for of, ablations in (("", [run.left_out for run in runs]), ("_retrained", [run.retrained for run in runs])):
        for key, kind in (("cost", "block"), ("cost_clients", "client")):
            costs: dict[str, list[Cost]] = {}
            for one in (one for ablation in ablations if ablation for one in ablation.costs if one.kind == kind):
                costs.setdefault(one.name, []).append(one)
            if costs or not of:
                found[key + of] = {name: round(fmean(one.blocks for one in same), 4) for name, same in costs.items()}
                found[f"{key}_llm{of}"] = {
                    name: round(fmean(one.llm for one in same), 4) for name, same in costs.items()
                }
    return found
