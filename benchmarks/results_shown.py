"""Tables and plots of `docs/results.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from legolm.runs import Data, Stage
from results_read import BENCHES, DEFAULT, FEDIT, MASKS, PLAIN, Evaluation, Run
from results_study import UNABLE, Stat, Study, personal_ratios

SHOWN = ("centralized", FEDIT, "fedit-heterogeneous", MASKS, DEFAULT, BENCHES["paper"], "fedit_capable")
"""Of the tables by task."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without the columns that are empty in every row."""
    found = list(rows)
    kept = [place for place in range(len(head)) if any(row[place] for row in found)]
    lines = [head, ["---"] * len(head), *found]
    return "\n".join("| " + " | ".join(line[place] for place in kept) + " |" for line in lines) + "\n"


def main_table(study: Study) -> str:
    """Every scheme, the best first."""

    def line(name: str) -> list[str]:
        runs, pair = study.runs[name], study.paired(name)
        flops = [run.flops for run in runs.values() if run.flops]
        others = [run.others for run in runs.values() if run.others is not None]
        return [
            f"**{name}**" if name == study.default else name + " †" * (name in UNABLE),
            study.over(name, lambda run: run.loss).shown(),
            "" if pair is None or name == study.default else pair.shown(sign="+") + " \\*" * study.elsewhere(name),
            study.over(name, lambda run: run.exact_match).shown(1, scale=100),
            study.over(name, study.label_loss).shown() if study.labelled(name) else "",
            study.over(name, study.label_accuracy).shown(1, scale=100) if study.labelled(name) else "",
            study.over(name, lambda run: run.own).shown(),
            Stat.of(others).shown() if others else "",
            f"{study.bytes(name):.2f}",
            f"{study.over(name, lambda run: run.tokens).mean / 1e3:,.0f}",
            f"{fmean(flops) / 1e12:,.0f}" if flops else "",
            str(max(run.rank for run in runs.values())),
            f"{next(iter(runs.values())).rate:g}",
            str(len(runs)),
        ]

    head = ("scheme", "LLM's loss", "HeteAgg's minus it", "exact %", "loss, labels", "exact %, labels", "blocks, own",
            "blocks, others'", "MB", "k tokens", "TFLOP", "rank", "rate", "seeds")  # fmt: skip
    rows = [line(name) for name in study.order]
    if study.labels:
        loss, most = study.floor("loss"), study.floor("exact_match")
        cells = [Stat.of(loss.values()).shown(), Stat.of(most.values()).shown(1, scale=100)]
        rows.append(["*best constant guess, in hindsight*", "", "", "", *cells, *[""] * 7, str(len(loss))])
    return table(head, rows)


def task_table(study: Study) -> str:
    """The LLM on each task beside its floor: loss, and exact match."""
    shown = [name for name in SHOWN if name in study.runs]
    floors = list(study.bench.floors.values())
    rows = []
    for id in next(iter(floors), {}):
        known = [one[id] for one in floors if id in one]
        losses, most = [one.loss for one in known if one.loss is not None], [one.exact_match for one in known]
        cells = [Stat.of(losses).shown() if losses else "", *(study.over(name, loss_on(id)).shown() for name in shown)]
        cells += [Stat.of(most).shown(0, scale=100) if most else ""]
        cells += [study.over(name, exact_on(id)).shown(0, scale=100) for name in shown]
        rows.append((id, *cells))
    seeds = {name: len(study.runs[name]) for name in shown}
    few = {name: f" ({seeds[name]} seed{'s' * (seeds[name] > 1)})" * (seeds[name] < len(floors)) for name in shown}
    losses_of, exact_of = [f"{name}, loss{few[name]}" for name in shown], [f"{name} %{few[name]}" for name in shown]
    return table(("task", "constant guess, loss", *losses_of, "constant guess %", *exact_of), rows)


def loss_on(id: str) -> Callable[[Run], float]:
    return lambda run: run.llm[id].loss


def exact_on(id: str) -> Callable[[Run], float]:
    return lambda run: run.llm[id].exact_match


def bytes_table(study: Study) -> str:
    """Form and pruning told apart: what a client with each block sends and receives, as share of FedIT's."""
    whole = study.bytes(FEDIT)
    dense = {name: study.runs[name][min(study.runs[name])].block_bytes for name in study.runs}
    rows = [("neither: FedIT, everyone dense", whole)]
    if "dense" in dense.get(PLAIN, {}):
        rows.append(("the form: frozen side, a dense client", dense[PLAIN]["dense"] / 1e6))
    for name, form in (("heteagg_factor", "pruning"), (PLAIN, "both")):
        if name in study.runs:
            rows.append((f"{form}: {name}", study.bytes(name)))
    shown = [(name, f"{count:.2f}", f"{count / whole:.0%}") for name, count in rows]
    return table(("what saves", "MB a client and round", "of FedIT's"), shown)


def client_table(study: Study) -> str:
    """Each client's block by stage, means over seeds."""
    name = study.default
    of: dict[Stage, str] = {"before": name, "local": study.alone, "global": name, "personal": study.ends or name}
    found = {stage: study.clients(variant) for stage, variant in of.items()}
    ratios = personal_ratios(study, study.ends) if study.ends else {}

    def cell(id: str, data: Data, stage: Stage) -> str:
        values = [one.loss(data)[stage] for one in found[stage].get(id, ()) if stage in one.loss(data)]
        return Stat.of(values).shown() if values else ""

    columns: list[tuple[Data, Stage]] = [(data, stage) for data in get_args(Data) for stage in of]
    called = {"local": called_alone(study)}
    head = ["client", "block", *(f"{data}, {called.get(stage, stage)}" for data, stage in columns)]
    rows = [
        [id, same[0].block, *(cell(id, *one) for one in columns), f"{ratios[id]:.2f}" if id in ratios else ""]
        for id, same in found["global"].items()
    ]
    return table([*head, "personal / alone, own"], rows)


def called_alone(study: Study) -> str:
    """What trained alone: the paper's clients have the whole LLM then, whatever their block is in the rounds."""
    blocks, alone = study.clients(study.default), study.clients(study.alone)
    other = any(one[0].block != blocks[id][0].block for id, one in alone.items() if id in blocks)
    return "whole LLM alone" if other else "alone"


def rates_table(study: Study) -> str:
    """Validation losses of the first seed by learning rate; what was chosen is bold."""
    tried = {name: run for name in study.order for run in study.runs[name].values() if run.rates}
    rates = sorted({float(rate) for run in tried.values() for rate in run.rates})

    def cell(run: Run, rate: float) -> str:
        loss = run.rates.get(f"{rate:g}")
        return "" if loss is None else f"**{loss:.3f}**" if rate == run.rate else f"{loss:.3f}"

    rows = [(name, *(cell(run, rate) for rate in rates)) for name, run in sorted(tried.items())]
    return table(("scheme", *(f"{rate:g}" for rate in rates)), rows)


def omission_table(found: Mapping[str, Any]) -> str:
    """What leaving out costs."""
    again = any(key.endswith("_retrained") for key in found)
    columns = ("without", "", "blocks lose", "the LLM loses")

    def cell(key: str, name: str) -> str:
        return f"{found[key][name]:+.3f}" if name in found.get(key, {}) else ""

    keys = [f"{whose}{of}" for of in ("", "_retrained")[: 1 + again] for whose in ("", "_llm")]
    return table(columns + ("trained again: blocks", "the LLM") * again, [
        (name, kind, *(cell(f"{key}{of}", name) for of in keys))
        for key, kind in (("cost", "block"), ("cost_clients", "client"))
        for name in found[key]
    ])  # fmt: skip


def evaluation_table(found: Evaluation) -> str:
    """Figures before and after, with the paired test."""
    rows = []
    for name, one in found.figures.items():
        change = Stat(one.difference, one.stderr).shown(sign="+")
        rows.append((name, f"{one.before:.3f}", f"{one.after:.3f}", change, f"{one.p:.2g}"))
    return table(("figure", "before", "after", "difference", "p"), rows)


def figure_3(study: Study, out: Path) -> None:
    """Each client's loss on its own and the others' data after each global update, and alone; means over seeds."""
    runs, blocks = study.runs[study.default].values(), study.clients(study.default)
    alone = study.clients(study.alone)
    figure, axes = plt.subplots(2, -(-len(blocks) // 2), figsize=(10, 4.6), sharex=True, squeeze=False)
    colours: dict[Data, str] = {"own": "#2f6fde", "others": "#c2410c"}
    for axis, (id, clients) in zip(axes.flat, blocks.items(), strict=False):
        for data, colour in colours.items():
            by_round: dict[int, list[float]] = {}
            for one in (one for run in runs for one in run.history):
                if (loss := one.clients[id][data == "others"]) is not None:
                    by_round.setdefault(one.round, []).append(loss)
            shown = [Stat.of(losses) for losses in by_round.values()]
            means, errors = [one.mean for one in shown], [one.se or 0.0 for one in shown]
            axis.errorbar(list(by_round), means, errors, marker="o", color=colour, label=f"{data}, global update")
            levels = [found["local"] for one in alone.get(id, clients) if "local" in (found := one.loss(data))]
            if levels:
                axis.axhline(fmean(levels), color=colour, linestyle="--", label=f"{data}, {called_alone(study)}")
        axis.set_title(f"{id}\n{clients[0].block}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("round", fontsize=8)
    figure.supylabel("loss, nats an answer token", fontsize=8)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, out)


def figure_5(found: Mapping[str, Any], out: Path) -> None:
    """What the blocks lose without each block and each client, beside the gain over training alone."""
    bars = {**found["cost"], **{f"{name} ": cost for name, cost in found["cost_clients"].items()}}
    figure, axes = plt.subplots(figsize=(8, 3.4))
    colours = ["#2f6fde"] * len(found["cost"]) + ["#9dbcf2"] * len(found["cost_clients"])
    axes.bar(range(len(bars)), list(bars.values()), color=colours)
    if found["gain"] is not None:
        axes.axhline(found["gain"] / 2, linestyle="--", color="#c2410c", label="half of the gain over trained alone")
        axes.legend(fontsize=8, frameon=False)
    axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", fontsize=7)
    axes.set_ylabel("blocks' loss, above that with all", fontsize=8)
    figure.tight_layout()
    save(figure, out)


def loss_against_bytes(study: Study, out: Path) -> None:
    """What a client sends and receives, and the LLM's loss with its standard error."""
    figure, axes = plt.subplots(figsize=(7, 4))
    losses = {name: study.over(name, lambda run: run.loss) for name in study.order if study.bytes(name)}
    if not losses:
        return
    gap = 0.04 * (max(one.mean for one in losses.values()) - min(one.mean for one in losses.values()))
    named: dict[float, float] = {}  # the height of the last name above each amount
    for name, loss in losses.items():
        sent = study.bytes(name)
        colour = "#2f6fde" if name.startswith("heteagg") else "#c2410c"
        axes.errorbar(sent, loss.mean, loss.se or 0.0, marker="o", color=colour)
        near = [height for other, height in named.items() if abs(other - sent) < 1]
        named[sent] = height = max([loss.mean, *(one + gap for one in near)])
        axes.annotate(
            name, (sent, height), textcoords="offset points", xytext=(-6, 0), ha="right", va="center", fontsize=7
        )
    axes.set_xlim(0, 1.05 * max(study.bytes(name) for name in losses))
    axes.set_xlabel("MB a client and round, both ways", fontsize=8)
    axes.set_ylabel("the LLM's loss, nats an answer token", fontsize=8)
    figure.tight_layout()
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """As SVG that is the same each time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "legolm"}):
        figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
