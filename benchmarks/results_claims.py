"""Whether what should hold does, of a study's runs and as LEGO's paper says."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from results_read import FEDIT, MASKS, RANK_4, Evaluation
from results_study import Pair, Stat, Study, beside_alone, beside_global, omission, personal


class Claim(NamedTuple):
    """What was found of a claim, and whether it holds, None where nobody measured it.

    `sure`: whether by more than the error, where that is known. `single`: by one seed.
    """

    found: str
    holds: bool | None = None
    sure: bool | None = None
    single: bool = False

    def shown(self) -> str:
        """A cell of the claims' table."""
        if self.holds is None:
            return self.found
        more = ", within the error" * (self.sure is False) + ", by one seed" * self.single
        return f"{self.found}: {'yes' if self.holds else '**no**'}{more}"


def any_of(pairs: Iterable[Stat]) -> bool | None:
    """Whether some difference is beyond the error; None where none is and one has no error."""
    found = [pair.beyond() for pair in pairs]
    return True if True in found else None if None in found else False


def all_of(pairs: Iterable[Stat]) -> bool | None:
    """Whether all differences are; None where all that have an error are."""
    found = [pair.beyond() for pair in pairs]
    return False if False in found else None if None in found else True


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
        few += "; on another processor" * study.elsewhere(name) + f"; {more}" * bool(more)
        text = f"{ours:.3f} / {theirs:.3f} = {ours / theirs:.2f} ({pair.shown(sign='+')}{few})"
        found[claim] = Claim(text, ours <= theirs, pair.beyond(), len(both) == 1)

    if FEDIT in study.runs:
        below("the LLM's loss is at or below FedIT's with everyone dense, at equal tokens", FEDIT)
        share = study.bytes(study.default) / study.bytes(FEDIT)
        rank, of_fedit = (max(run.rank for run in study.runs[name].values()) for name in (study.default, FEDIT))
        codecs = {run.codec for name in (study.default, FEDIT) for run in study.runs[name].values()}
        text = f"{share:.0%} (rank {rank} beside {of_fedit})"
        if len(codecs) == 1:
            found["for under half of its bytes, same codec"] = Claim(text, share < 0.5)
    if RANK_4 in study.runs:
        size = f"{study.bytes(study.default):.2f} MB beside {study.bytes(RANK_4):.2f}"
        below(f"at or below FedIT's of rank 4, at about as many bytes (`{RANK_4}`)", RANK_4, size)
    # Zeros save no work: to masked blocks equal steps are equal time.
    if "fedit_seconds" in study.runs and study.default != MASKS:
        below("at or below FedIT's with three quarters of the steps (`fedit_seconds`)", "fedit_seconds")
    if study.labels:
        runs = study.runs[study.default].items()
        if loss := Pair.of({seed: study.label_loss(run) for seed, run in runs}, study.floor("loss")):
            above = loss.difference
            found["its loss is below the label prior in hindsight (tasks with labels)"] = Claim(
                f"{loss.ours.shown()} and {loss.theirs.mean:.3f} ({above.shown(sign='+')})",
                above.mean < 0,
                above.beyond(),
                loss.single,
            )
        if right := Pair.of({seed: study.label_accuracy(run) for seed, run in runs}, study.floor("exact_match")):
            above = right.difference
            found["its accuracy is at least 5 points above the most frequent answer's (tasks with labels)"] = Claim(
                f"{right.ours.shown(1, scale=100)} % and {right.theirs.mean:.1%} ({above.shown(1, '+', 100)})",
                above.mean >= 0.05,
                above.beyond(0.05),
                right.single,
            )
    pairs = {name: pair for name in study.peers if (pair := study.paired(name)) is not None}
    if pairs:
        worse = {name: pair for name, pair in pairs.items() if pair.mean >= 0}
        single = all(pair.se is None for pair in (worse or pairs).values())
        told = [f"than {len(pairs) - len(worse)} of {len(pairs)}"]
        told += [f"not {name} ({pair.shown(sign='+')})" for name, pair in worse.items()]
        for what, known in (("within the error", False), ("by one seed", None)):
            names = [name for name, pair in pairs.items() if name not in worse and pair.beyond() is known]
            if names and not (single and known is None):  # the verdict says so
                told.append(f"{what}: {', '.join(names)}")
        if elsewhere := sum(map(study.elsewhere, pairs)):
            told.append(f"{elsewhere} on another processor")
        # One that is surely better settles it; that all are worse is as sure as the least sure of them.
        sure = any_of(worse.values()) if worse else all_of(pairs.values())
        found["better than every peer that the same devices can run"] = Claim("; ".join(told), not worse, sure, single)
    if study.ends:
        if own := beside_alone(study, study.ends):
            claim = "personal models are at or below trained alone on their own data, in the mean"
            text = f"{own.shown()} ({own.difference.shown(4, '+')})"
            found[claim] = Claim(text, own.ratio <= 1, own.difference.beyond(), own.single)
            one = personal(study, study.ends)
            text = f"{one['worst_client']} {one['worst_client_ratio']:.2f}"
            found["no client above 1.05 of it"] = Claim(text, one["worst_client_ratio"] <= 1.05, single=own.single)
        if others := beside_global(study, study.ends):
            found["and within 5 % of the global update on the others'"] = Claim(
                others.shown(), others.ratio <= 1.05, single=others.single
            )
    for what, key in (
        ("leaving out any block costs less than half of the gain over trained alone", "cost"),
        ("and leaving out any one client", "cost_clients"),
    ):
        if not omitted or omitted["gain"] is None:
            found[what] = Claim("not measured")
            continue
        costs, gain, of = omitted[key], omitted["gain"], omitted["of"]
        held = {one.id: one.block for run in study.runs[of].values() for one in run.clients}
        lacks = (set(held.values()) if key == "cost" else held.keys()) - costs.keys()
        name = max(costs, key=lambda one: float(costs[one]))
        text = f"{name} {costs[name]:+.3f} of {gain:.3f}" + f" ({of})" * (of != study.default)
        text += f"; not measured: {', '.join(sorted(lacks))}" if lacks else ""
        known = None if lacks and costs[name] < gain / 2 else costs[name] < gain / 2
        found[what] = Claim(text, known, single=len(omitted["seeds"]) == 1)
        if name in (again := omitted.get(f"{key}_retrained", {})):
            kind = "block" if key == "cost" else "client"
            text = f"{name} {again[name]:+.3f} of {gain:.3f}"
            found[f"the dearest {kind} of these, where the others train again without it"] = Claim(
                text, again[name] < gain / 2, single=len(omitted["seeds"]) == 1
            )
    what = "the LLM's WikiText perplexity is at most 3 % worse"
    found[what] = Claim("not measured")
    if robust and (change := robust.figures.get("wikitext")):
        rise, difference = change.after / change.before - 1, Stat(change.difference, change.stderr)
        found[what] = Claim(f"{rise:+.1%}", rise <= 0.03, difference.beyond(0.03 * change.before), single=True)
    return found


def paper_claims(study: Study) -> dict[str, Claim]:
    """What LEGO's paper says, at this size."""
    found: dict[str, Claim] = {}

    def seeds(*names: str) -> set[int]:
        """Those that all of these variants have."""
        return set.intersection(*(set(study.runs.get(name, {})) for name in names))

    def losses(*names: str) -> list[float]:
        """The LLM's, mean over these."""
        return [fmean(study.runs[name][seed].loss for seed in seeds(*names)) for name in names]

    for method in ("sparsegpt", "wanda"):
        mixed, iid, fedit, fedit_iid = f"{method}-heterogeneous", f"{method}-iid", "fedit-heterogeneous", "fedit-iid"
        for names in ((mixed, fedit), (iid, fedit_iid)):
            if both := seeds(*names):
                ours, theirs = losses(*names)
                found[f"models may differ: the LLM of {names[0]} is within 10 % of FedIT's with everyone dense"] = (
                    Claim(
                        f"{ours:.3f} / {theirs:.3f} = {ours / theirs:.2f}", ours <= 1.1 * theirs, single=len(both) == 1
                    )
                )
        if four := seeds(mixed, iid, fedit, fedit_iid):
            mine, mine_iid, other, other_iid = losses(mixed, iid, fedit, fedit_iid)
            found[f"data may differ: one task a client costs {method} blocks no more than FedIT"] = Claim(
                f"{mine - mine_iid:+.3f} and {other - other_iid:+.3f}",
                mine - mine_iid <= other - other_iid,
                single=len(four) == 1,
            )
        if clients := study.clients(mixed):
            rises = [fmean(one.others["global"] - one.others["before"] for one in same) for same in clients.values()]
            better = sum(rise < 0 for rise in rises)
            found[
                f"every {method} block is better on the others' data after the global update than untrained (figure 3)"
            ] = Claim(f"{better} of {len(rises)}", better == len(rises), single=len(study.runs[mixed]) == 1)
        if there := Pair.of(study.stages(mixed, "others", "global"), study.stages("alone", "others", "local")):
            whole = study.by_client("alone", "others", "local")
            pairs = [Pair.of(one, whole.get(id, {})) for id, one in study.by_client(mixed, "others", "global").items()]
            below = [pair.difference.mean < 0 for pair in pairs if pair]
            found[f"and {method} blocks are better there than whole LLMs that trained alone, in the mean"] = Claim(
                f"{there.ours.mean:.3f} and {there.theirs.mean:.3f}; {sum(below)} of {len(below)} clients",
                there.difference.mean < 0,
                single=there.single,
            )
    what = "the LLM is worse without any one block (figure 5)"
    found[what] = Claim("not measured")
    if omitted := omission(study):
        costs = omitted["cost_llm"]
        worse = [f"{name} {cost:+.3f}" for name, cost in costs.items() if cost > 0]
        text = f"{len(worse)} of {len(costs)}: {', '.join(worse) or 'none'}"
        found[what] = Claim(text, len(worse) == len(costs), single=len(omitted["seeds"]) == 1)
    return found
