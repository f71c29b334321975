"""The claims beside every peer: `docs/results.md`, `docs/results.json` and their plots, from the folders of runs.

    legolm compare examples/compare/flan.yaml --out RUNS/flan --blocks RUNS/blocks --no-models   # and other seeds:
    legolm compare examples/compare/flan.yaml --out RUNS/flan-1 --blocks RUNS/blocks --no-models --set seed=1
    legolm compare examples/compare/flan.yaml --out RUNS/flan-2 --blocks RUNS/blocks --no-models --set seed=2
    legolm compare examples/compare/flan_rates.yaml --out RUNS/flan_rates --blocks RUNS/blocks --no-models
    legolm compare examples/compare/flan_rates.yaml --out RUNS/flan_rates-1 --blocks RUNS/blocks --no-models
        --set seed=1
    legolm compare examples/compare/flan_models.yaml --out RUNS/flan_models --blocks RUNS/blocks --no-models
    legolm compare examples/compare/flan_ideal.yaml --out RUNS/flan_ideal --blocks RUNS/blocks --no-models
    legolm compare examples/compare/flan_settings.yaml --out RUNS/flan_settings --blocks RUNS/blocks --no-models
    legolm compare examples/compare/flan_gap.yaml --out RUNS/flan_gap --blocks RUNS/blocks --no-models
    legolm run examples/flan/public.yaml --out RUNS/public
    legolm compare examples/compare/flan_warm.yaml --out RUNS/flan_warm --blocks RUNS/blocks --no-models
        --set aggregate.start=RUNS/public
    legolm run examples/flan/mixed.yaml --out RUNS/personal --set train.steps=6 --set federation.personal_steps=4
        --set federation.personal=last
    legolm ablate RUNS/flan/heteagg_frozen_side
    legolm ablate RUNS/flan/heteagg_frozen_side --out RUNS/hellaswag --include examples/tasks --tasks hellaswag
        --limit 200
    legolm run RUNS/flan/heteagg_frozen_side/config.yaml --out RUNS/flan/heteagg_frozen_side --resume    # final models
    legolm run RUNS/flan/local/config.yaml --out RUNS/flan/local --resume    # final models
    python benchmarks/compose.py RUNS/flan/local --group snli,cola --group snli,cola,wic,definite_pronoun_resolution
        --out RUNS/compose.json
    python benchmarks/server_step.py RUNS/flan/heteagg_frozen_side --out RUNS/server_step.json
    legolm eval starter RUN/final/llm RUN/blocks/structured-25 RUN/final/snli RUN/blocks/structured-50 RUN/final/cola
        RUN/blocks/sparsegpt-50 RUN/final/wic RUN/blocks/structured-75 RUN/final/definite_pronoun_resolution
        --include examples/tasks --tasks hellaswag,arc_easy,arc_challenge --limit 200 --text TEST.txt --windows 20
        --precision bf16 --out RUNS/robustness.json    # RUN: RUNS/flan/heteagg_frozen_side; TEST.txt: WikiText-2's
    python benchmarks/results.py RUNS [--notes benchmarks/results_notes.md] [--out docs]

Every command from the folder that holds the data (`examples/flan/mixed.yaml` says which). Only RUNS/flan has to be
there, whole; what else is missing is left out. One thing is computed here and kept beside the runs: FedIT's global
adapter sliced onto the mixed blocks. What the page is made from is kept in OUT/results/records, which can be RUNS too:
without the adapters, a few kilobytes a run. Last line: one JSON object, that of `docs/results.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from legolm.system import read_json
from results_read import (
    DEFAULT,
    FORMS,
    Record,
    claims,
    cpu_of,
    everything,
    keep,
    main_table,
    robustness,
    rows_of,
    settings_of,
    trained_alone,
)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def study_table(path: Path, main: Record | None = None) -> str:
    """The rows of one comparison; the LLM's losses are those of `main`, the table of several seeds, if given."""
    rows, usual = [], cpu_of(path.parent / "flan" / DEFAULT)
    for one in rows_of(path):
        llm = main["llm_loss"][one["name"]] if main else one["llm"]
        more = f" ± {main['llm_spread'][one['name']]:.3f}" if main and one["name"] in main["llm_spread"] else ""
        others = "" if one["others"] is None else f"{one['others']:.3f}"
        chosen_by = "" if one["llm_validation"] is None else f"{one['llm_validation']:.3f}"
        memory = "" if one["memory"] is None else f"{one['memory'] / 1e6:,.0f}"
        mark = "" if cpu_of(path / one["name"]) == usual else " †"
        rate = settings_of(path / one["name"])["train"]["learning_rate"]
        rows.append((
            one["name"] + mark, f"{rate:g}", f"{llm:.3f}{more}", chosen_by, f"{one['own']:.3f}", others,
            f"{one['bytes_down'] / 1e6:.2f}", f"{one['bytes_up'] / 1e6:.2f}", f"{one['tokens']:,.0f}",
            f"{one['flops'] / 1e12:.0f}", memory, f"{one['seconds'] / 60:.0f}",
        ))  # fmt: skip
    return table(
        ("variant", "rate", "LLM", "LLM, validation", "blocks, own", "blocks, others'", "MB down", "MB up", "tokens",
         "client TFLOP", "client MB", "min"), rows,
    )  # fmt: skip


def seeds_of(runs: Path) -> dict[str, Path]:
    """The main table's comparisons by seed."""
    others = {path.name.removeprefix("flan-"): path for path in sorted(runs.glob("flan-[0-9]*")) if path.is_dir()}
    return {"0": runs / "flan"} | others


def other_cpus(runs: Path, usual: str) -> list[str]:
    """What else runs were made on than the first."""
    return sorted({cpu_of(path.parent) for path in runs.glob("flan*/*/summary.json")} - {usual})


def rates_table(runs: Path) -> str:
    """Each scheme's loss of the LLM on validation data by learning rate and seed; that of the main table is bold."""
    found: dict[str, dict[float, list[float]]] = {}
    chosen: dict[str, float] = {}
    studies = [runs / name for name in ("flan", "flan_ideal", "flan_rates", "flan-1", "flan_rates-1")]
    for study in (study for study in studies if (study / "compare.json").exists()):
        for row in rows_of(study):
            name, rate = row["name"].partition("-")[0], settings_of(study / row["name"])["train"]["learning_rate"]
            loss = row["validation" if trained_alone(row) else "llm_validation"]
            chosen.setdefault(name, rate)  # the tables come first
            if loss is not None:
                found.setdefault(name, {}).setdefault(rate, []).append(loss)
    rates = sorted({rate for losses in found.values() for rate in losses})

    def cell(name: str, rate: float) -> str:
        text = ", ".join(f"{loss:.3f}" for loss in found[name].get(rate, ()))
        return f"**{text}**" if chosen[name] == rate else text

    return table(
        ("scheme", *(f"{rate:g}" for rate in rates)), [(name, *(cell(name, rate) for rate in rates)) for name in found]
    )


def gap_table(runs: Path) -> str:
    """What may bring the LLM nearer to FedIT's, beside the two as they are in the main table; on validation data."""
    rows = [row for row in rows_of(runs / "flan") if row["name"] in (DEFAULT, "fedit_everyone")]
    rows += rows_of(runs / "flan_gap")
    warm = rows_of(runs / "flan_warm") if (runs / "flan_warm" / "compare.json").exists() else []
    rows += [row | {"name": f"{row['name']}, warm start"} for row in warm]
    return settings_table(rows)


def settings_table(rows: Sequence[Record]) -> str:
    """What settings are chosen by, and what they cost."""
    return table(
        ("variant", "LLM, validation", "blocks, validation", "rounds", "MB down and up, all rounds"),
        [
            (one["name"], f"{one['llm_validation']:.3f}", f"{one['validation']:.3f}", one["rounds"],
             f"{one['rounds'] * (one['bytes_down'] + one['bytes_up']) / 1e6:.1f}") for one in rows
        ],
    )  # fmt: skip


def personal_table(run: Path) -> str:
    """The blocks' losses on their own and the others' data, stage by stage."""
    clients, phases = read_json(run / "summary.json")["clients"], ("before", "local", "global", "personal")
    rows = [
        (name, *(f"{fmean(client[key][phase] for client in clients):.3f}" for phase in phases))
        for name, key in (("own task", "own"), ("the others' tasks", "others"))
    ]
    return table(("", "before", "alone", "global update", "personal step"), rows)


def compose_table(found: Sequence[Record]) -> str:
    """A column a group of clients; a row a way to compose their blocks, after what they are without."""
    rows = [(name, *(f"{one[name]:.3f}" for one in found)) for name in ("before", "apart", "own")]
    rows += [(name, *(f"{one['composed'][name]:.3f}" for one in found)) for name in found[0]["composed"]]
    return table(("", *(", ".join(one["clients"]) for one in found)), rows)


def figure_3(study: Path, out: Path) -> None:
    """Each client's loss on the others' data: alone, and after each global update."""
    summary = read_json(study / DEFAULT / "summary.json")
    alone = {client["id"]: client for client in read_json(study / "local" / "summary.json")["clients"]}
    rounds = [entry["round"] for entry in summary["history"]]
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), sharex=True)
    for place, client in zip(axes.flat, summary["clients"], strict=False):
        for data, colour in (("own", "#2f6fde"), ("others", "#c2410c")):
            line = [entry["clients"][client["id"]][data] for entry in summary["history"]]
            place.plot(rounds, line, marker="o", color=colour, label=f"{data}, global update")
            level = alone[client["id"]][data]["local"]
            place.axhline(level, color=colour, linestyle="--", label=f"{data}, trained alone")
        place.set_title(f"{client['id']}\n{client['block']}", fontsize=8)
        place.set_xticks(rounds)
        place.tick_params(labelsize=7)
    figure.supxlabel("round", fontsize=8)
    figure.supylabel("loss, nats an answer token", fontsize=8)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, out)


def figure_5(found: Record, out: Path) -> None:
    """The blocks' loss without each block and each client, beside trained alone and the global update."""
    bars = found["without"]
    figure, axes = plt.subplots(figsize=(8, 3.4))
    colours = ["#2f6fde" if one["kind"] == "block" else "#9dbcf2" for one in bars]
    axes.bar(range(len(bars)), [one["blocks"] for one in bars], color=colours)
    for name, key in (("global update", "all"), ("trained alone", "local")):
        if found[key]:
            axes.axhline(found[key]["blocks"], linestyle="--", color="#c2410c" if key == "all" else "#555", label=name)
    axes.set_xticks(range(len(bars)), [one["name"] for one in bars], rotation=30, ha="right", fontsize=7)
    axes.set_ylabel("blocks' loss on all data", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, out)


def loss_against_bytes(rows: Sequence[Record], losses: Mapping[str, float], out: Path) -> None:
    """Where each scheme is: what a client sends and receives, and the LLM's loss."""
    figure, axes = plt.subplots(figsize=(7, 4))
    sent = {one["name"]: (one["bytes_down"] + one["bytes_up"]) / 1e6 for one in rows}
    shown = sorted((name for name in sent if sent[name]), key=lambda name: losses[name])
    gap = 0.04 * (losses[shown[-1]] - losses[shown[0]])
    named: dict[float, float] = {}  # the height of the last name above each amount
    for name in shown:
        axes.plot(sent[name], losses[name], "o", color="#2f6fde" if name in FORMS else "#c2410c")
        named[sent[name]] = height = max(losses[name], named.get(sent[name], 0.0) + gap)
        axes.annotate(
            name, (sent[name], height), textcoords="offset points", xytext=(-6, 0), ha="right", va="center", fontsize=7
        )
    axes.set_xlim(0, 1.05 * max(sent.values()))
    axes.set_xlabel("MB a client and round, both ways", fontsize=8)
    axes.set_ylabel("the LLM's loss, nats an answer token", fontsize=8)
    figure.tight_layout()
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """As SVG that is the same each time."""
    with plt.rc_context({"svg.hashsalt": "legolm"}):
        figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def page(found: Record, runs: Path, plots: str, notes: str) -> str:
    """`docs/results.md`."""
    main, study = found["mixed_heterogeneous"], runs / "flan"
    summary = read_json(study / DEFAULT / "summary.json")
    machine = summary["machine"]
    config = settings_of(study / DEFAULT)
    cpus = {seed: cpu_of(path / DEFAULT) for seed, path in seeds_of(runs).items()}
    seeds = [seed if cpu == machine["cpu"] else f"{seed} (on {cpu})" for seed, cpu in cpus.items()]
    others = ", ".join(other_cpus(runs, machine["cpu"]))
    footnote = f" †: run on another processor ({others}), whose products round otherwise.\n" if others else "\n"
    parts = [
        "# Results\n",
        "Written by `python benchmarks/results.py RUNS` from the folders of runs; its first lines have the commands. "
        f"What it read is in [{plots}/records]({plots}/records), from which it can be written again. "
        f"{summary['model']} is SmolLM2-135M-Instruct; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, one thread a run, two runs at a time. Eight clients, one FLAN task each "
        f"([`examples/flan/mixed.yaml`](../examples/flan/mixed.yaml)), {config['federation']['rounds']} rounds of "
        f"{config['train']['steps']} steps of {config['train']['batch_size']} examples, "
        f"{config['data']['limit_test']} test pairs a task. Losses are nats per answer token on test data, sets "
        f"counting the same; the LLM has {main['llm_before']:.3f} before training. Seeds: {', '.join(seeds)}.\n",
        "## What should hold\n",
        table(("claim", "found", "holds"), [(a, b, "yes" if c else "**no**") for a, b, c in claims(found)]),
        "## Every scheme, mixed blocks, one task a client\n",
        "`examples/compare/flan.yaml`.\n",
        study_table(study, main),
        "LLM: mean and standard deviation over the seeds that ran, each after the round that is best for it on "
        "validation data; all else in this table is of the first seed. `capable` leaves out who does not hold the "
        "whole LLM (six of eight clients); `three_capable` counts the device of the SparseGPT block in, whose zeros "
        "save no memory yet. `everyone` is the ideal that weak devices cannot run. `local` has no LLM: its row is the "
        "untrained one. Client TFLOP: the decoder's operations in all clients' "
        "training. Client MB: what training needs by the plan's estimate, mean over those who train. Min: wall time of "
        "the rounds, most of it scoring, for which mixed blocks are more models than one." + footnote,
        f"![loss against bytes]({plots}/bytes.svg)\n",
        "## Clients after each global update (the paper's figure 3)\n",
        "Means of the seeds; the plot is of the first.\n",
        table(
            ("client", "block", "own: before", "alone", "global", "others': before", "alone", "global",
             "all: global", "FedIT's adapter sliced"),
            [
                (one["id"], one["block"], *(f"{one[key]:.3f}" for key in (
                    "own_before", "own_local", "own_global", "others_before", "others_local", "others_global",
                    "all_global", "all_fedit_sliced")))
                for one in main["clients"]
            ],
        ),
        f"![clients by round]({plots}/clients.svg)\n",
    ]  # fmt: skip
    if (runs / "personal" / "summary.json").exists():
        parts += [
            "## The personal step\n",
            "As many steps as above, spent otherwise: two rounds of six, and four of each client's own at the end "
            "(`federation.personal_steps`). Means over the clients' blocks, of seed 0, on "
            f"{cpu_of(runs / 'personal')}.\n",
            personal_table(runs / "personal"),
        ]
    if (runs / "flan_models" / "compare.json").exists():
        parts += [
            "## Who holds what, and IID data\n",
            f"As {DEFAULT} above, which is the mixed blocks' row for one task a client "
            "(`examples/compare/flan_models.yaml`).\n",
            study_table(runs / "flan_models"),
        ]
    if (runs / "flan_ideal" / "compare.json").exists():
        parts += [
            "## The rank schemes over everyone, the ideal\n",
            "Everyone holds the whole LLM, at the rank at which an adapter has the bytes of the client's own block's "
            "(`match_bytes`; `examples/compare/flan_ideal.yaml`). FedIT's row at rank 8 for all is fedit_everyone "
            "above.\n",
            study_table(runs / "flan_ideal"),
        ]
    if (runs / "flan_settings" / "compare.json").exists():
        parts += [
            "## The defaults, one changed at a time\n",
            f"On validation data, of seed 0, on {cpu_of(runs / 'flan_settings' / 'default')}. Names: "
            f"`examples/compare/flan_settings.yaml`; `default` is {DEFAULT}.\n",
            settings_table(rows_of(runs / "flan_settings")),
        ]
    if (runs / "flan_gap" / "compare.json").exists():
        parts += [
            "## The gap to FedIT with everyone dense\n",
            "On validation data, of seed 0. Names: `examples/compare/flan_gap.yaml` and `flan_warm.yaml`.\n",
            gap_table(runs),
        ]
    if (runs / "flan_rates" / "compare.json").exists():
        parts += [
            "## Learning rates\n",
            "The LLM's loss on validation data, 16 pairs a task, of seed 0, or of seeds 0 and 1; bold: what the tables "
            "above have, the others are of `examples/compare/flan_rates.yaml`. From 0.002 up and down until it gets "
            "worse; by the mean where both seeds ran. `everyone` of the rank schemes: at FedIT's rate and the half of "
            "it. For `local`, which has no LLM, the mean loss of clients' blocks on their own validation data.\n",
            rates_table(runs),
        ]
    if (runs / "server_step.json").exists():
        steps = read_json(runs / "server_step.json")
        parts += [
            "## What else the server could have done with the first round's updates\n",
            "The LLM's loss on validation data after round 1 (`benchmarks/server_step.py`); of seed 0.\n",
            table(("setting", "LLM, validation"), [(name, f"{loss:.3f}") for name, loss in steps.items()]),
        ]  # fmt: skip
    if (runs / "compose.json").exists():
        parts += [
            "## Blocks trained apart, composed (the paper's figure 4)\n",
            "Mean loss on the test data of these clients, of seed 0. `before`: the LLM's; `apart`: of each block that "
            "trained alone, on all of them; `own`: on its own client's (`benchmarks/compose.py`).\n",
            compose_table(read_json(runs / "compose.json")["groups"]),
        ]
    if "omission" in found:
        omission = found["omission"]
        parts += [
            "## One left out (the paper's figure 5)\n",
            f"Gain over trained alone: {omission['gain']:.3f} nats, mean over all blocks and all data.\n",
            table(("without", "", "blocks lose", "the LLM loses"), [
                (one["name"], one["kind"], f"{one['blocks']:+.3f}", f"{one['llm']:+.3f}") for one in omission["rows"]
            ]),
            f"![one left out]({plots}/omission.svg)\n",
        ]  # fmt: skip
    if (runs / "hellaswag" / "ablation.json").exists():
        asked = read_json(runs / "hellaswag" / "ablation.json")
        parts += [
            "The paper's measure, the LLM's accuracy on HellaSwag, which no client trains (200 questions; difference "
            f"to all together ± standard error, paired test): {asked['before']['hellaswag acc']:.3f} before, "
            f"{asked['all']['hellaswag acc']:.3f} with all. (The next table's LLM is the "
            "written checkpoint, rounded to bfloat16.)\n",
            table(("without", "", "accuracy"), [(one["name"], one["kind"], left_out(one)) for one in asked["without"]]),
        ]
    if "robustness" in found:
        models = found["robustness"]["models"]
        parts += [
            "## What nobody trained\n",
            "Before and after the federation, and the difference ± its standard error with the p of the paired test "
            "(`legolm eval`); of seed 0.\n",
            table(("figure", *models), [
                (name, *(changed(models[model][name]) for model in models)) for name in models["LLM"]
            ]),
        ]  # fmt: skip
    return "\n".join([*parts, notes])


def left_out(one: Record) -> str:
    """The LLM's accuracy without a block or client, with the paired test against all together."""
    paired = one["paired"]["hellaswag acc"]
    return f"{one['hellaswag acc']:.3f} ({paired['difference']:+.3f} ± {paired['stderr']:.3f}, p {paired['p']:.2g})"


def changed(one: Record) -> str:
    """A figure before and after, with the paired test."""
    p = "p < 0.001" if one["p"] < 0.001 else f"p {one['p']:.2g}"
    return f"{one['before']:.3f} → {one['after']:.3f} ({one['difference']:+.3f} ± {one['stderr']:.3f}, {p})"


def cost_rows(left_out: Record) -> list[Record]:
    """What the blocks' and the LLM's losses rise by without each block and each client."""
    return [
        {key: one[key] for key in ("name", "kind")}
        | {key: one[key] - left_out["all"][key] for key in ("blocks", "llm")}
        for one in left_out["without"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that holds the comparisons' folders")
    parser.add_argument("--notes", type=Path, default=Path("benchmarks/results_notes.md"), help="what surprised")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    runs = options.runs
    found: Record = {"mixed_heterogeneous": main_table(seeds_of(runs))}
    ablation = runs / "flan" / DEFAULT / "ablation.json"
    plots = options.out / "results"
    plots.mkdir(parents=True, exist_ok=True)
    if ablation.exists():
        left_out = read_json(ablation)
        found["omission"] = {"gain": None, "cost": left_out["cost"], "rows": cost_rows(left_out)}
        alone = read_json(runs / "flan" / "local" / "summary.json")["clients"]
        mean = fmean(everything(client, "local", len(alone)) for client in alone)
        found["omission"]["gain"] = mean - left_out["all"]["blocks"]
        left_out["local"] = {"blocks": mean}
        figure_5(left_out, plots / "omission.svg")
    if (runs / "robustness.json").exists():
        found["robustness"] = robustness(runs / "robustness.json", runs / "flan" / DEFAULT)
    keep(runs, plots / "records")
    found["claims"] = [{"claim": a, "found": b, "holds": c} for a, b, c in claims(found)]
    figure_3(runs / "flan", plots / "clients.svg")
    losses = found["mixed_heterogeneous"]["llm_loss"]
    loss_against_bytes(rows_of(runs / "flan"), losses, plots / "bytes.svg")
    notes = options.notes.read_text(encoding="utf-8") if options.notes.exists() else ""
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "results.md").write_text(page(found, runs, plots.name, notes), encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
