"""What follows from a study's runs: figures by variant over seeds, paired differences, and whether claims hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from legolm.runs import Data, Stage
from results_read import DEFAULT, FEDIT, LOCAL, MASKS, PERSONAL, PLAIN, RANK_4, Bench, Client, Cost, Evaluation, Run

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


class Claim(NamedTuple):
    """What was found of a claim, and whether it holds, if that can be told; `sure` if beyond the error, where known."""

    found: str
    holds: bool | None
    sure: bool | None = None

    def shown(self) -> str:
        """A cell of the claims' table."""
        told = {True: "yes", False: "**no**", None: "not to be told with one seed"}[self.holds]
        return f"{self.found}: {told}{', within the error' * (self.sure is False)}"


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
    found["before"] = study.over(study.order[0], lambda run: run.llm_before).named("loss")
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


def claims(study: Study, robust: Evaluation | None) -> dict[str, Claim]:
    """What should hold, as far as there are runs to tell."""
    found: dict[str, Claim] = {}
    if study.default not in study.runs:
        return found
    omitted = omission(study)

    def below(claim: str, name: str, more: str = "") -> None:
        if (pair := study.paired(name)) is None:
            return
        both = study.both(name)
        ours, theirs = (fmean(run.loss for run in runs) for runs in zip(*both, strict=True))
        seeds = ", ".join(str(run.seed) for run, _ in both)
        few = f"; seed{'s' * (len(both) > 1)} {seeds}" if len(both) < len(study.runs[study.default]) else ""
        apart = {run.machine.cpu for run, _ in both} != {run.machine.cpu for _, run in both}
        few += "; on other processors" * apart + f"; {more}" * bool(more)
        text = f"{ours:.3f} / {theirs:.3f} = {ours / theirs:.2f} ({pair.shown(sign='+')}{few})"
        found[claim] = Claim(text, ours <= theirs, pair.beyond())

    if FEDIT in study.runs:
        below("the LLM's loss is at or below FedIT's with everyone dense, at equal tokens", FEDIT)
        share = study.bytes(study.default) / study.bytes(FEDIT)
        rank, theirs = (max(run.rank for run in study.runs[name].values()) for name in (study.default, FEDIT))
        text = f"{share:.0%} (rank {rank} beside {theirs})"
        found["for under half of its bytes, same codec"] = Claim(text, share < 0.5)
    if RANK_4 in study.runs:
        size = f"{study.bytes(study.default):.2f} MB beside {study.bytes(RANK_4):.2f}"
        below(f"at or below FedIT's of rank 4, at about as many bytes (`{RANK_4}`)", RANK_4, size)
    # Zeros save no work: to masked blocks equal steps are equal time.
    if "fedit_seconds" in study.runs and study.default != MASKS:
        below("at or below FedIT's with three quarters of the steps (`fedit_seconds`)", "fedit_seconds")
    if study.labels:
        loss, prior = study.over(study.default, study.label_loss), study.floor("loss", study.labels)
        right, most = study.over(study.default, study.label_accuracy), study.floor("exact_match", study.labels)
        above = study.above_floor("loss", study.label_loss)
        found["its loss is below the label prior (tasks with labels)"] = Claim(
            f"{loss.shown()} and {prior.mean:.3f} ({above.shown(sign='+')})", above.mean < 0, above.beyond()
        )
        above = study.above_floor("exact_match", study.label_accuracy)
        found["its accuracy is at least 5 points above the majority class (tasks with labels)"] = Claim(
            f"{right.shown(1, scale=100)} % and {most.mean:.1%} ({above.shown(1, '+', 100)})",
            above.mean >= 0.05,
            above.beyond(0.05),
        )
    pairs = {name: pair for name in study.peers if (pair := study.paired(name)) is not None}
    if pairs:
        worse = {name: pair for name, pair in pairs.items() if pair.mean >= 0}
        told = [f"than {len(pairs) - len(worse)} of {len(pairs)}"]
        for name, pair in pairs.items():
            if name in worse:
                told.append(f"not {name} ({pair.shown(sign='+')})")
            elif pair.beyond() is not True:
                told.append(f"{name} {'within the error' if pair.se is not None else 'by one seed'}")
        sure = all(pair.beyond() is not False for pair in (worse or pairs).values())
        found["better than every peer that the same devices can run"] = Claim(", ".join(told), not worse, sure)
    if study.ends:
        one = personal(study, study.ends)
        share, apart = one["own"] / one["own_alone"], one["others"] / one["others_global"]
        own, alone = study.stages(study.ends, "own", "personal"), study.stages(study.alone, "own", "local")
        both = [own[seed] - alone[seed] for seed in sorted(own.keys() & alone.keys())]
        apart_own = Stat.of(both) if both else None
        text = f"{one['own']:.3f} / {one['own_alone']:.3f} = {share:.2f}"
        text += f" ({apart_own.shown(4, '+')})" if apart_own else ""
        claim = "personal models are at or below trained alone on their own data, in the mean"
        found[claim] = Claim(text, share <= 1, apart_own.beyond() if apart_own else None)
        most_of, text = one["worst_client_ratio"], f"{one['worst_client']} {one['worst_client_ratio']:.2f}"
        found["no client above 1.05 of it"] = Claim(text, most_of <= 1.05)
        text = f"{one['others']:.3f} / {one['others_global']:.3f} = {apart:.2f}"
        found["and within 5 % of the global update on the others'"] = Claim(text, apart <= 1.05)
    if omitted and omitted["gain"] is not None:
        gain, of = omitted["gain"], "" if omitted["of"] == study.default else f" ({omitted['of']})"
        for what, costs in (
            ("leaving out any block costs less than half of the gain over trained alone", omitted["cost"]),
            ("and leaving out any one client", omitted["cost_clients"]),
        ):
            blocks = {one.id: one.block for run in study.runs[omitted["of"]].values() for one in run.clients}
            lacks = set(blocks.values()) - costs.keys() if costs is omitted["cost"] else blocks.keys() - costs.keys()
            if lacks:
                continue
            name = max(costs, key=lambda one: float(costs[one]))
            found[what] = Claim(f"{name} {costs[name]:+.3f} of {gain:.3f}{of}", costs[name] < gain / 2)
    if robust and (change := robust.figures.get("wikitext")):
        rise, difference = change.after / change.before - 1, Stat(change.difference, change.stderr)
        found["the LLM's WikiText perplexity is at most 3 % worse"] = Claim(
            f"{rise:+.1%}", rise <= 0.03, difference.beyond(0.03 * change.before)
        )
    return found


def paper_claims(study: Study) -> dict[str, Claim]:
    """What LEGO's paper says, at this size."""
    found: dict[str, Claim] = {}

    def losses(*names: str) -> list[float] | None:
        """The LLM's, mean over the seeds that all of these variants have; None without any."""
        seeds = set.intersection(*(set(study.runs.get(name, {})) for name in names))
        return [fmean(study.runs[name][seed].loss for seed in seeds) for name in names] if seeds else None

    for method in ("sparsegpt", "wanda"):
        mixed, iid, fedit, fedit_iid = f"{method}-heterogeneous", f"{method}-iid", "fedit-heterogeneous", "fedit-iid"
        for ours, theirs in ((mixed, fedit), (iid, fedit_iid)):
            if both := losses(ours, theirs):
                share = both[0] / both[1]
                found[f"models may differ: the LLM of {ours} is within 10 % of FedIT's with everyone dense"] = Claim(
                    f"{both[0]:.3f} / {both[1]:.3f} = {share:.2f}", share <= 1.1
                )
        if four := losses(mixed, iid, fedit, fedit_iid):
            apart, theirs_apart = four[0] - four[1], four[2] - four[3]
            found[f"data may differ: one task a client costs {method} blocks no more than FedIT"] = Claim(
                f"{apart:+.3f} and {theirs_apart:+.3f}", None if len(study.runs[mixed]) == 1 else apart <= theirs_apart
            )
        if clients := study.clients(mixed):
            rises = [fmean(one.others["global"] - one.others["before"] for one in same) for same in clients.values()]
            better = sum(rise < 0 for rise in rises)
            found[f"every {method} block is better on the others' data after the global update (figure 3)"] = Claim(
                f"{better} of {len(rises)}", better == len(rises)
            )
        if mixed in study.runs and "alone" in study.runs:
            after, alone = study.stage(mixed, "others", "global").mean, study.stage("alone", "others", "local").mean
            found[f"and {method} blocks are better there than whole LLMs that trained alone"] = Claim(
                f"{after:.3f} and {alone:.3f}", after < alone
            )
    if omitted := omission(study):
        costs = omitted["cost_llm"]
        worse = [f"{name} {cost:+.3f}" for name, cost in costs.items() if cost > 0]
        found["the LLM is worse without any one block (figure 5)"] = Claim(
            f"{len(worse)} of {len(costs)}: {', '.join(worse) or 'none'}", len(worse) == len(costs)
        )
    return found
