"""The claims beside every peer: `docs/results.md`, `docs/results.json` and their plots, from the folders of runs.

    legolm compare examples/compare/flan.yaml --seeds 3 --jobs 2 --no-models --out RUNS/flan
    legolm compare examples/compare/languages.yaml --seeds 3 --jobs 2 --no-models --out RUNS/languages
    legolm compare examples/compare/labels.yaml --seeds 3 --jobs 2 --no-models --out RUNS/labels
    legolm run examples/flan/public.yaml --out RUNS/public
    legolm compare examples/compare/flan_warm.yaml --seeds 3 --no-models --out RUNS/warm
        --set aggregate.start=RUNS/public
    legolm compare examples/paper/compare.yaml --no-models --out RUNS/paper
    legolm ablate RUN                             # RUN: RUNS/languages' heteagg_masks, else heteagg_near
    legolm ablate RUN --retrain --only NAME       # the dearest block
    legolm run RUN/config.yaml --out RUN --resume # its final models
    legolm eval starter RUN/final/llm --text TEST.txt --out RUNS/robustness.json    # TEST.txt: WikiText-2's
    legolm eval starter RUN/final/llm --data SENTENCES.jsonl --rouge --out RUNS/sentences.json
    python benchmarks/results.py RUNS [--gpu NAME] [--notes benchmarks/results_notes.md] [--out docs]

From the folder that holds the data (`data.fetch` says how they come). Of all this only RUNS/flan, RUNS/languages
or RUNS/labels has to be there; the page says what is missing, and begins, as does the JSON, with the first that is. Of
a run's folder it reads config.yaml, run.json, metrics.jsonl, summary.json, ablation.json and retrained.json. What
tables use of them is kept in OUT/results/records, which can be RUNS too. `--gpu`: which one the runs had, for they do
not say. Last line: one JSON object, that of `docs/results.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from legolm.errors import LegolmError
from results_claims import Claim, claims, paper_claims
from results_read import BENCHES, DEFAULT, FEDIT, MASKS, Bench, Evaluation, keep, read_bench, read_evaluation
from results_shown import (
    bytes_table,
    client_table,
    evaluation_table,
    figure_3,
    figure_5,
    loss_against_bytes,
    main_table,
    omission_table,
    rates_table,
    table,
    task_table,
)
from results_study import Study, figures, omission

EXAMPLES = Path(__file__).parent.parent / "examples"
STUDIES = {
    "flan": "compare/flan.yaml",
    "warm": "compare/flan_warm.yaml",
    "languages": "compare/languages.yaml",
    "labels": "compare/labels.yaml",
    "paper": "paper/compare.yaml",
}
TITLES = {
    "languages": "dates, a language a client",
    "labels": "labels, a task a client",
    "flan": "FLAN, a task a client",
    "paper": "the paper's setting",
}
EVALUATED = {"robustness": "what nobody trained", "sentences": "tasks whose answers are sentences"}


def missing(benches: Mapping[str, Bench | None], evaluated: Mapping[str, Evaluation | None]) -> list[str]:
    """What the page would have had."""
    found = [f"`legolm eval` of {EVALUATED[name]}" for name, one in evaluated.items() if one is None]
    for name, bench in benches.items():
        if bench is None:
            found.append(f"{STUDIES[name]}: no run of it")
            continue
        variants = yaml.safe_load((EXAMPLES / STUDIES[name]).read_text("utf-8"))["variants"]
        seeds: dict[str, set[int]] = {one["name"]: set() for one in variants}
        tried = dict.fromkeys(seeds, 1)
        for run in bench.runs:
            seeds.setdefault(run.name, set()).add(run.seed)
            tried[run.name] = max(tried.get(run.name, 1), len(run.rates))
        every = set[int]().union(*seeds.values())
        lacks = {one["name"]: sorted(every - seeds[one["name"]]) for one in variants if seeds[one["name"]] < every}
        if lacks:
            found.append(f"{STUDIES[name]}, by seeds: {', '.join(f'{one} {lost}' for one, lost in lacks.items())}")
        few = [
            f"{one['name']} {tried[one['name']]} of {len(one['rates'])}"
            for one in variants
            if seeds[one["name"]] and tried[one["name"]] < len(one.get("rates", ()))
        ]
        if few:
            found.append(f"{STUDIES[name]}, learning rates: {', '.join(few)}")
    return found


def about(study: Study) -> str:
    """A study's length, and the machines of its runs."""
    one, runs, ours = study.bench.setting, study.every, study.runs[study.default].values()
    ranks = sorted({run.rank for run in runs})
    scored = sorted({found.round for run in ours for found in run.history})
    machines = {f"{run.machine.cpu}, {run.machine.cores} cores, {run.machine.memory_gb:.0f} GB" for run in runs}
    where = " and ".join(sorted(machines)) + (f" with {study.bench.gpu}" if study.bench.gpu else "")
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    codecs = " and ".join(sorted({run.codec for run in runs}))
    return (
        f"{one.rounds} rounds of {one.steps} steps of {one.batch_size} examples, ranks {', '.join(map(str, ranks))}, "
        f"scored at rounds {', '.join(map(str, scored))}, {one.test} test rows a client, seeds {seeds}, codec "
        f"{codecs}; {where}. The LLM has {fmean(run.llm_before for run in ours):.3f} before."
    )


def subjects(study: Study) -> list[Study]:
    """The study as seen from each scheme that claims are made of: masks, and narrow blocks, which alone save memory and
    time."""
    beside = {MASKS: DEFAULT, DEFAULT: MASKS}.get(study.default)
    return [study, Study(study.bench, default=beside)] if beside in study.runs else [study]


def server_work(study: Study) -> str:
    """Seconds of cutting and recovery, and of training."""
    run = next(iter(study.runs[study.default].values()))
    return (
        f"Server: cutting and recovering the blocks of {run.name} took {run.cut_seconds:,.0f} s, once; a client's "
        f"training in a round {run.train_seconds:.1f} s (seed {run.seed})."
    )


class Page:
    """`docs/results.md`: sections, each followed by what the notes have under its title."""

    def __init__(self, notes: str) -> None:
        sections = [one.partition("\n") for one in f"\n{notes}".split("\n## ")[1:]]
        self.notes = {title: text.strip() for title, _, text in sections}
        self.parts = ["# Results\n"]

    def add(self, title: str, *parts: str) -> None:
        """A section."""
        self.parts += [f"## {title}\n", *parts]
        if text := self.notes.pop(title, ""):
            self.parts.append(f"{text}\n")

    def add_notes(self, title: str) -> None:
        """A section of notes alone, where there are any."""
        if self.notes.get(title):
            self.add(title)

    def text(self) -> str:
        """The page, and at its end what other notes there are."""
        for title in list(self.notes):
            self.add_notes(title)
        return "\n".join(self.parts)


READING = (
    "Losses are nats an answer token on test data, clients counting the same, each LLM's after the scored round that "
    "is best for it on validation data; *exact* is the share of answers that are right to the letter. ± is the "
    'standard error over seeds; differences are paired by seed, and "within the error" is within the 95 % interval of '
    "Student's t: 4.3 standard errors to each side with three seeds, two over many questions."
)
COLUMNS = (
    "*Labels*: tasks with at most ten different answers. *Blocks*: mean loss of clients' blocks on their own and the "
    "others' data. \\*: on another processor or in another precision. MB: a client and round, both ways. Rank: the "
    "largest. †: no peer, for devices with narrow blocks cannot run it, or it is no "
    "federation (`fedhello` has the whole LLM everywhere too, but trains few layers; `heteagg_masks` takes the LLM's "
    "memory in training too, so that `fedit_everyone` and `fedit_rank_4` are its peers). `capable` leaves out who does "
    "not hold the whole LLM; `local` has no LLM: its row is the untrained one."
)


def write_page(
    studies: Mapping[str, Study],
    held: Mapping[str, Mapping[str, Mapping[str, Claim]]],
    evaluated: Mapping[str, Evaluation | None],
    page: Page,
    lacks: Sequence[str],
) -> str:
    """First what a reader takes in, then the rest; `held` are claims by study and scheme."""
    study = next(iter(studies.values()))
    benches = {name: one for name, one in studies.items() if name != "paper"}
    kept = {f"{TITLES[name]}: {scheme}": found for name in benches for scheme, found in held[name].items()}
    page.parts.append(
        "Written by `python benchmarks/results.py RUNS`, whose first lines have the commands; what it used of the runs "
        f"is in [results/records](results/records), the figures in [results.json](results.json). {READING}\n"
    )
    for name, one in studies.items():
        page.parts.append(f"**{TITLES[name]}** (`examples/{STUDIES[name]}`; {one.bench.setting.model}): {about(one)}\n")
    rows = [
        (claim, *(one[claim].shown() if claim in one else "" for one in kept.values()))
        for claim in dict.fromkeys(claim for one in kept.values() for claim in one)
    ]
    page.add("What should hold", table(("claim", *kept), rows))
    if "paper" in studies:
        (found,) = held["paper"].values()
        told = [(claim, one.shown()) for claim, one in found.items()]
        page.add("The paper's claims", table(("claim", "found"), told))
    shown = list(benches)[:2]
    for name in shown:
        page.add(f"Every scheme: {TITLES[name]}", main_table(studies[name]), f"{server_work(studies[name])}\n")
    page.parts.append(f"{COLUMNS}\n\n# The rest\n")
    page.add_notes("The claims, one by one")
    if FEDIT in study.runs:
        page.add("Bytes: form and pruning", bytes_table(study))
    for name, one in studies.items():
        if name not in shown:
            work = f"{server_work(one)}\n" if one.default in one.runs else ""
            page.add(f"Every scheme: {TITLES[name]}", main_table(one), work)
        labels = f"With labels: {', '.join(one.labels)}. " if one.labels else ""
        page.add(
            f"What the model can learn at all: {TITLES[name]}",
            f"The LLM on each task beside what a constant guess has. {labels}Where almost every answer is another one "
            "a constant guess has no loss to compare with.\n",
            task_table(one),
            plot(name, "bytes"),
        )
        if one.default in one.runs:
            title = f"Clients before and after the global update (the paper's figure 3): {TITLES[name]}"
            page.add(title, client_table(one), plot(name, "clients"))
        if omitted := omission(one):
            gain = "" if omitted["gain"] is None else f" Gain over trained alone: {omitted['gain']:.3f}."
            page.add(
                f"One left out (the paper's figure 5): {TITLES[name]}",
                f"Nats, mean over all blocks and all data; seeds {', '.join(map(str, omitted['seeds']))}.{gain}\n",
                omission_table(omitted),
                plot(name, "omission"),
            )
    for name, evaluation in evaluated.items():
        if evaluation:
            page.add(
                EVALUATED[name].capitalize(),
                "The LLM before and after, seed 0: the difference ± its standard error over questions, and the p of "
                "the paired test (`legolm eval`).\n",
                evaluation_table(evaluation),
            )
    for name, one in benches.items():
        if any(run.rates for run in one.every):
            page.add(
                f"Learning rates: {TITLES[name]}",
                "The LLM's loss on validation data (`local`: the blocks' on their own) with the first seed; bold is "
                "what went on with the others.\n",
                rates_table(one),
            )
    if lacks:
        page.add("What is missing", "\n".join(f"- {one}" for one in lacks) + "\n")
    return page.text()


def listed(found: Mapping[str, Claim]) -> list[dict[str, Any]]:
    """Claims as JSON has them."""
    return [{"claim": claim, **one._asdict()} for claim, one in found.items()]


def plot(name: str, kind: str) -> str:
    """A link to a plot of a study."""
    return f"![{kind}](results/{name}_{kind}.svg)\n"


def write(runs: Path, out: Path, gpu: str, notes: Path) -> dict[str, Any]:
    """All files; gives what `docs/results.json` has. Raises `LegolmError` without finished runs of the default."""
    benches = {name: read_bench(runs, name, gpu) for name in BENCHES}
    evaluated = {name: read_evaluation(runs / f"{name}.json") for name in EVALUATED}
    warm = benches["warm"]
    studies = {
        name: Study(one, warm.runs if warm and name == "flan" else (), default=BENCHES[name])
        for name in TITLES
        if (one := benches[name]) and any(run.name == BENCHES[name] for run in one.runs)
    }
    if not studies.keys() - {"paper"}:
        raise LegolmError(f"{runs / 'flan'}: no finished run of {DEFAULT}; run examples/compare/flan.yaml to its end")
    (out / "results" / "records").mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Any]] = {}
    held: dict[str, dict[str, dict[str, Claim]]] = {}
    first = next(iter(studies))  # of whose run the evaluations are
    for name, study in studies.items():
        robust = evaluated["robustness"] if name == first else None
        if name == "paper":
            held[name] = {study.default: paper_claims(study)}
        else:
            held[name] = {of.default: claims(of, robust if of is study else None) for of in subjects(study)}
        parts[name] = figures(study)
        for scheme, found in held[name].items():
            parts[name]["claims" if scheme == study.default else f"claims_{scheme}"] = listed(found)
        loss_against_bytes(study, out / "results" / f"{name}_bytes.svg")
        if study.default in study.runs:
            figure_3(study, out / "results" / f"{name}_clients.svg")
        if omitted := omission(study):
            figure_5(omitted, out / "results" / f"{name}_omission.svg")
        if robust and (change := robust.figures.get("wikitext")):
            parts[name]["robustness"] = {"wikitext_before": change.before, "wikitext_after": change.after}
    result = {"bench": first} | parts.pop(first) | parts
    for name, record in {**benches, **evaluated}.items():
        if record:
            keep(record, out / "results" / "records" / f"{name}.json")
    page = Page(notes.read_text("utf-8") if notes.exists() else "")
    (out / "results.md").write_text(write_page(studies, held, evaluated, page, missing(benches, evaluated)), "utf-8")
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that holds the studies' folders, or their records")
    parser.add_argument("--gpu", default="", help="the runs' GPU, if they had one")
    parser.add_argument("--notes", type=Path, default=Path("benchmarks/results_notes.md"), help="text by section")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    try:
        print(json.dumps(write(options.runs, options.out, options.gpu, options.notes)))
    except LegolmError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
