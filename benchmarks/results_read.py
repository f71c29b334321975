"""What `results.py` reads from the folders of runs: figures and claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import yaml

from legolm.block import Block, llm_block, read_block
from legolm.config import RunConfig, load
from legolm.evaluation import compare
from legolm.evaluation.figure import ratio_figure
from legolm.evaluation.paired import Comparison
from legolm.federate.server import Rounds, begin
from legolm.federate.transport import Exchange, run_local
from legolm.models import fingerprint, resolve
from legolm.runs import RunDir
from legolm.system import Progress, read_json

Record = dict[str, Any]
FORMS = ("heteagg_factor", "heteagg_frozen_side", "heteagg_exact")
DEFAULT = "heteagg_frozen_side"
BYTES = ("bytes_down", "bytes_up")
KEPT = (
    "*.json", "hellaswag/ablation.json", "personal/summary.json", "flan*/compare.json", "flan*/sliced.json",
    "flan*/*/config.yaml", "flan*/*/metrics.jsonl", "flan*/*/summary.json", "flan*/*/ablation.json",
)  # fmt: skip


def opened(folder: Path, *changes: str) -> tuple[RunConfig, dict[str, Block]]:
    """A finished run's config with changes (`a.b=value`), and its blocks and the LLM (`llm`) by name."""
    run = RunDir(folder)
    config = load(run.config_file, list(changes))
    base = resolve(config.model)
    blocks = {"llm": llm_block(base, fingerprint(base))}
    return config, blocks | {spec.name: read_block(run.block(spec.name)) for spec in config.blocks}


def sliced(study: Path) -> dict[str, float]:
    """Each client's loss over all clients' test data of its own block with FedIT's global adapter sliced onto it."""
    known = study / "sliced.json"
    if not known.exists():
        run, summary = RunDir(study / DEFAULT), read_json(study / DEFAULT / "summary.json")
        start = f"aggregate.start={study / 'fedit_everyone'}"
        config, blocks = opened(run.path, start, "aggregate.form=factor")
        block_of = {client["id"]: client["block"] for client in summary["clients"]}
        rounds = Rounds(run, config, summary["run_id"], blocks, block_of, Progress())

        def body(exchange: Exchange) -> None:
            scored = rounds.score_global(begin(config, blocks["llm"]), exchange, "FedIT's adapter, sliced")
            found = {id: scores.loss for id, scores in scored.by_client().items()}
            known.write_text(json.dumps(found, indent=1) + "\n")

        run_local(run, config, 1, body)
    found: dict[str, float] = read_json(known)
    return found


def rows_of(study: Path) -> list[Record]:
    """The rows of a finished comparison; ends the program where there is none."""
    if not (study / "compare.json").exists():
        raise SystemExit(f"{study}: no compare.json; finish its comparison first")
    found = json.loads((study / "compare.json").read_text())
    rows: list[Record] = found if isinstance(found, list) else found["rows"]  # a list until schema 2
    return rows


def trained_alone(row: Record) -> bool:
    """Whether nobody's update went anywhere; a scheme of its own until schema 2."""
    return row["scheme"] == "local_only" or row.get("mode") == "alone"


def settings_of(run: Path) -> Record:
    """The resolved config as it is written: older versions of legolm had other keys."""
    found: Record = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return found


def cpu_of(run: Path) -> str:
    """The processor that a run was made on."""
    return str(read_json(run / "summary.json")["machine"]["cpu"])


def rounds_of(run: Path) -> list[Record]:
    """What a run recorded of its rounds, that before training among them."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["stage"] == "round"]


def clients_of(study: Path) -> list[Record]:
    """Every client's losses in one seed's comparison: alone, with the global update, with FedIT's adapter sliced."""
    clients = read_json(study / DEFAULT / "summary.json")["clients"]
    alone = {client["id"]: client for client in read_json(study / "local" / "summary.json")["clients"]}
    onto = sliced(study)
    return [
        {
            "id": client["id"],
            "block": client["block"],
            "own_before": client["own"]["before"],
            "own_local": alone[client["id"]]["own"]["local"],
            "own_global": client["own"]["global"],
            "others_before": client["others"]["before"],
            "others_local": alone[client["id"]]["others"]["local"],
            "others_global": client["others"]["global"],
            "all_global": everything(client, "global", len(clients)),
            "all_fedit_sliced": onto[client["id"]],
        }
        for client in clients
    ]


def mean_of(records: Sequence[Record]) -> Record:
    """Records that say the same things, as one: the means of their numbers."""
    first = records[0]
    return {
        key: fmean(one[key] for one in records) if isinstance(value, float) else value for key, value in first.items()
    }


def everything(client: Mapping[str, Any], phase: str, count: int) -> float:
    """A client's loss over all clients' test data."""
    return float((client["own"][phase] + (count - 1) * client["others"][phase]) / count)


def shaped_compute(study: Path) -> float:
    """Operations of the clients with dense or structured blocks, over those of dense clients on the same tokens."""
    blocks = {one["name"]: one for one in read_json(study / DEFAULT / "summary.json")["blocks"]}
    spent = dense = 0.0
    for record in rounds_of(study / DEFAULT):
        for id, one in record["train"].items():
            block = next(found for found in blocks.values() if id in found["clients"])
            if block["method"] in ("dense", "structured"):
                spent, dense = spent + block["coverage"]["weights"] * one["tokens"], dense + one["tokens"]
    return spent / dense


def main_table(seeds: Mapping[str, Path]) -> Record:
    """The figures of `examples/compare/flan.yaml`, means over the seeds that have them.

    Bytes and compute are the first seed's, and clients those of the seeds that also trained alone.
    """
    rows = {seed: {row["name"]: row for row in rows_of(path)} for seed, path in seeds.items()}
    first, study = next(iter(rows.values())), next(iter(seeds.values()))
    losses = {name: [found[name]["llm"] for found in rows.values() if name in found] for name in first}
    alone = [path for seed, path in seeds.items() if "local" in rows[seed]]
    clients = [mean_of(same) for same in zip(*map(clients_of, alone), strict=True)]

    def ratio(name: str, *parts: str) -> float:
        ours, theirs = (sum(first[one][part] for part in parts) for one in (name, "fedit_everyone"))
        return float(ours / theirs)

    return {
        "seeds": list(seeds),
        "clients": clients,
        "default_scheme": DEFAULT,
        "llm_before": round(fmean(found[DEFAULT]["llm_before"] for found in rows.values()), 4),
        "llm_loss": {name: round(fmean(found), 4) for name, found in losses.items()},
        "llm_spread": {name: round(stdev(found), 4) for name, found in losses.items() if len(found) > 1},
        "bytes_ratio_vs_fedit": round(ratio(DEFAULT, *BYTES), 4),
        "compute_ratio_vs_fedit": round(shaped_compute(study), 4),
        "compute_ratio_vs_fedit_all_blocks": round(ratio(DEFAULT, "flops"), 4),
        "bytes_ratios_vs_fedit": {name: round(ratio(name, *BYTES), 4) for name in FORMS if name in first},
    }


def robustness(path: Path, run: Path) -> Record:
    """What nobody trained, before and after: the LLM's figures, and those of every block beside them (`models`).

    Every figure there has the two values, and the paired test of after against before. Blocks with the same global
    update are one model: one client's stands for all of them.
    """
    summary, results = read_json(run / "summary.json"), read_json(path)["results"]
    block_of = {client["id"]: client["block"] for client in summary["clients"]} | {"llm": "LLM"}
    models: Record = {}
    for one in results:
        name = "wikitext" if one["metric"] == "perplexity" else f"{one['task']}_{one['metric']}"
        place = Path(one["model"])
        after = place.parent.name == "final"
        model = block_of[place.name] if after else "LLM" if one["model"] == summary["model"] else place.name
        figure = ratio_figure(one["sums"], one.get("weights"), name, exponential=one["metric"] == "perplexity")
        models.setdefault(model, {}).setdefault(name, {})["after" if after else "before"] = figure
    figures = {
        model: {
            name: {"before": pair["before"].value, "after": pair["after"].value}
            | asdict(cast(Comparison, compare(pair["after"], pair["before"])))
            for name, pair in found.items()
        }
        for model, found in models.items()
    }
    llm = {f"{name}_{when}": one[when] for name, one in figures["LLM"].items() for when in ("before", "after")}
    return llm | {"models": figures}


def claims(found: Record) -> list[tuple[str, str, bool]]:
    """What should hold: the claim, what was found, whether it holds."""
    main, losses = found["mixed_heterogeneous"], found["mixed_heterogeneous"]["llm_loss"]
    ours, clients = losses[DEFAULT], main["clients"]
    better = sum(one["others_global"] < one["others_local"] for one in clients)
    onto = sum(one["all_global"] < one["all_fedit_sliced"] for one in clients)
    every = [
        ("every block is better on the others' tasks than trained alone", f"{better} of {len(clients)}",
         better == len(clients)),
        ("every block is better on all tasks than with FedIT's adapter sliced onto it", f"{onto} of {len(clients)}",
         onto == len(clients)),
    ]  # fmt: skip
    for name in ("fedit_capable", "fedit_three_capable", "hetlora_capable", "flexlora_capable", "flora_capable"):
        if name in losses:
            every.append(
                (f"the LLM is better than {name}'s", f"{ours:.3f} and {losses[name]:.3f}", ours < losses[name])
            )
    over = ours / losses["fedit_everyone"] - 1
    every += [
        ("the LLM is within 10 % of FedIT's with everyone dense", f"{over:+.1%}", over <= 0.1),
        ("for under 60 % of its bytes", f"{main['bytes_ratio_vs_fedit']:.0%}", main["bytes_ratio_vs_fedit"] < 0.6),
        ("and under 75 % of its client compute (dense and structured blocks)",
         f"{main['compute_ratio_vs_fedit']:.0%} ({main['compute_ratio_vs_fedit_all_blocks']:.0%} with the SparseGPT "
         "block, whose zeros save nothing)", main["compute_ratio_vs_fedit"] < 0.75),
    ]  # fmt: skip
    if "omission" in found:
        gain, cost = found["omission"]["gain"], found["omission"]["cost"]
        name, most = max(cost.items(), key=lambda one: float(one[1]))
        every.append(
            ("leaving out any block costs less than half of what was gained over local only",
             f"{name} {most:+.3f} of {gain:.3f}", most < gain / 2)
        )  # fmt: skip
    if "robustness" in found:
        ratio = found["robustness"]["wikitext_after"] / found["robustness"]["wikitext_before"] - 1
        every.append(("the LLM's WikiText perplexity is at most 3 % worse", f"{ratio:+.1%}", ratio <= 0.03))
    return every


def keep(runs: Path, out: Path) -> None:
    """Copy what the page is made from, a record a line."""
    for path in (path for pattern in KEPT for path in runs.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".json", ".yaml"):
            text = json.dumps(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)) + "\n"
        copy = out / path.relative_to(runs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
