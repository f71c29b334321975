"""Compare schemes: one config, several variants, one table (`legolm compare`).

Every variant is a run in its own folder, resumable as any other; blocks of the same recipe are cut once for all. All
train the same steps of the same batch size a client and round: tokens and bytes are what the runs counted, and where
budgets differ (fewer clients take part, more is sent) the table says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from legolm.adapter import adapter_parameters
from legolm.block import Base, Coverage
from legolm.config import AggregateConfig, BlockConfig, RunConfig, Variant, load_study
from legolm.errors import LegolmError
from legolm.models import load_config, resolve
from legolm.pipeline import run, with_precision
from legolm.plan import Parts, Plan, make_plan, read_parts
from legolm.prune import planned_coverage
from legolm.report import Raw, tag, wide_enough
from legolm.report.summary import best_round
from legolm.runs import RunDir
from legolm.system import Progress, atomic_write, check_room, held_bytes

Record = dict[str, Any]
COLUMNS = {
    "llm": "LLM",
    "own": "own",
    "others": "others'",
    "llm_validation": "LLM valid.",
    "validation": "valid.",
    "bytes_down": "MB down",
    "bytes_up": "MB up",
    "tokens": "tokens",
    "flops": "TFLOP",
    "memory": "memory",
    "seconds": "s",
}
LEGEND = (
    "Losses: nats per answer token on test data, of the LLM, and of the clients' blocks on their own and others' data; "
    "valid.: the LLM on all validation data, blocks on their own. MB: a client and round. Tokens, TFLOP: training of "
    "all clients. Memory: MB that training needs, mean of those who train."
)


def compare(
    path: Path, out: Path, changes: Sequence[str] = (), models: bool = True, store: Path | None = None
) -> list[Record]:
    """Run every variant in `out`/<name>, write compare.json and compare.html; one record a variant.

    `changes` (`a.b=value`) override the run that the variants vary. Without `models` no variant writes its final ones.
    Comparisons with the same `store` (`out`/blocks if not given) share blocks.
    """
    found, store = [], store or out / "blocks"
    # All first: bad input should not wait for the first run's end, nor another's folder or a small disk for the last.
    planned = plans(path, changes)
    blocks = [sum(block.file_bytes for block in plan.blocks) for _, plan in planned.values()]
    needed = sum(plan.disk_bytes - (0 if models else plan.models_bytes) for _, plan in planned.values())
    check_room(out, needed - sum(blocks) + max(blocks) - held_bytes(out))
    for name, (config, _) in planned.items():
        RunDir(out / name).check(with_precision(config, out / name), resume=True)
    for name, (config, plan) in planned.items():
        summary = run(config, out / name, (out / name).exists(), Progress(), store=store, models=models)
        found.append(row(name, config, plan, summary, out / name))
    atomic_write(out / "compare.json", json.dumps(found, indent=1) + "\n")
    atomic_write(out / "compare.html", page(found, path.stem))
    return found


def plans(path: Path, changes: Sequence[str] = ()) -> dict[str, tuple[RunConfig, Plan]]:
    """Config and plan of every variant, by name. Raises `LegolmError` for whatever cannot work."""
    study, configs = load_study(path, changes)
    read: dict[str, Parts] = {}
    found = {}
    for variant in study.variants:
        config = configs[variant.name]
        # Variants mostly differ in the scheme: their data is read once.
        shared: dict[str, Any] = dict.fromkeys(("model", "seed", "data", "train"), True)
        key = config.model_dump_json(include=shared | {"clients": {"__all__": {"id", "data"}}})
        if key not in read:
            read[key] = read_parts(config)
        parts = read[key]
        config = _prepared(config, variant, parts)
        found[variant.name] = config, make_plan(config, parts)
    return found


def row(name: str, config: RunConfig, plan: Plan, summary: Record, folder: Path) -> Record:
    """A variant's figures: the LLM's loss after the round that is best for it, the blocks' after that best for them.

    (Alone: after local training.) Costs are a client's in a round.

    Losses are nats per answer token on test data. To choose settings by: `llm_validation`, the LLM's on all clients'
    validation data, and `validation`, the blocks' on their own clients'. `tokens` are all that clients trained on in
    the rounds, `flops` the decoder's operations for them (`PlannedBlock.token_flops`), `memory` the mean of what the
    plan reckons that those who trained need (bytes). Data at one place has no clients, and neither.
    """
    alone = config.federation.mode == "alone"
    phase = "local" if alone else "global"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    wanted = [one for one in records if one["stage"] == "local" or (one["stage"] == "round" and one["round"])]
    trained = [client for one in wanted for client in _trained(one)]
    block_of, block = {one.id: one.block for one in plan.clients}, {one.name: one for one in plan.blocks}
    at_clients = [(block[block_of[id]], one) for id, one in trained if id in block_of]
    traffic = [count for one in records if one["stage"] == "round" for count in one["bytes"].values()]
    return {
        "name": name,
        "scheme": config.aggregate.scheme,
        "form": config.aggregate.settings.get("form", ""),
        "codec": config.federation.codec,
        "clients": len(summary["clients"]),
        "rounds": summary["rounds"],
        "best_round": summary["best_round"],
        "llm": summary["llm"]["loss_after"],
        "llm_before": summary["llm"]["loss_before"],
        "own": fmean(client["own"][phase] for client in summary["clients"]),
        "others": _mean(client["others"][phase] for client in summary["clients"]),
        "validation": _mean(one.get("validation") for one in wanted)  # runs of before it was recorded have none
        if alone
        else best_round(records, "validation")["validation"],
        "llm_validation": None if alone else best_round(records, "llm_validation")["llm_validation"],
        "bytes_down": _mean(count["down"] for count in traffic) or 0.0,
        "bytes_up": _mean(count["up"] for count in traffic) or 0.0,
        "replies": len(traffic),
        "tokens": sum(one["tokens"] for _, one in trained),
        "flops": sum(one["tokens"] * held.token_flops for held, one in at_clients),
        "memory": _mean(held.training_bytes for held, _ in at_clients),
        "seconds": sum(one["seconds"] for one in wanted if one["stage"] == "round")
        or max((one["seconds"] for one in wanted), default=0.0),
    }


def print_comparison(found: Sequence[Record], out: Path) -> None:
    """The table, and where the page is."""
    table = Table(box=None, pad_edge=False)
    for column in ("variant", *COLUMNS.values()):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for one in found:
        table.add_row(one["name"], *(_text(name, one[name]) for name in COLUMNS))
    console = wide_enough(table)
    console.print(table, LEGEND, sep="\n\n")
    console.print(budget(found) + f"\ntable {out / 'compare.html'}", highlight=False, soft_wrap=True)


def budget(found: Sequence[Record]) -> str:
    """Whether all variants had the same tokens and bytes, in words."""
    tokens = {one["tokens"] for one in found}
    up = [one["bytes_up"] for one in found if one["bytes_up"]]
    words = (
        "All variants trained on the same tokens"
        if len(tokens) == 1
        else (f"Tokens differ: {min(tokens):,.0f} to {max(tokens):,.0f}")
    )
    if not up:
        return words + "."
    if max(up) <= 1.02 * min(up):
        return words + "; all sent the same bytes (to 2 %)."
    return words + f"; bytes sent differ: {min(up) / 1e6:.2f} to {max(up) / 1e6:.2f} MB a client and round."


def page(found: Sequence[Record], title: str) -> str:
    """One self-contained HTML page: a plot of loss against bytes, and the table."""
    head = tag("tr", *(tag("th", text) for text in ("variant", "scheme", *COLUMNS.values())))
    rows = [
        tag("tr", tag("th", one["name"]), tag("td", one["scheme"]), *(tag("td", _text(c, one[c])) for c in COLUMNS))
        for one in found
    ]
    body = (
        tag("h1", f"{title}: schemes compared"),
        tag("p", "Loss per answer token (nats) on test data against bytes a client and round, both ways."),
        plot(found),
        tag("table", tag("thead", head), tag("tbody", *rows)),
        tag("p", LEGEND),
        tag("p", budget(found)),
    )
    top = (Raw('<meta charset="utf-8">'), tag("title", title), tag("style", Raw(_STYLE)))
    return f'<!doctype html>\n<html lang="en">{tag("head", *top)}{tag("body", tag("main", *body))}</html>\n'


def plot(found: Sequence[Record]) -> Raw:
    """Two panels of dots, the LLM's loss and the clients' on all data; bytes on a logarithmic axis."""
    width, height, left, bottom = 420, 260, 46, 34
    bytes_of = {one["name"]: one["bytes_down"] + one["bytes_up"] for one in found}
    sent = [value for value in bytes_of.values() if value > 0] or [1.0]
    low, high = math.log10(min(sent)) - 0.3, math.log10(max(sent)) + 0.3
    panels = []
    for shift, (label, values) in enumerate(
        (("LLM", [one["llm"] for one in found]), ("blocks, all data", [_everyone(one) for one in found]))
    ):
        least, most = min(values), max(values)
        span = (most - least) or 1.0
        marks = [tag("text", label, x=left, y=14, class_="name")]
        for share in (0.0, 0.5, 1.0):
            y = height - bottom - share * (height - bottom - 30)
            marks.append(tag("text", f"{least + share * span:.2f}", x=left - 6, y=y + 4, text_anchor="end"))
            marks.append(tag("line", x1=left, x2=width, y1=y, y2=y, class_="grid"))
        for one, value in zip(found, values, strict=True):
            amount = bytes_of[one["name"]]
            # What sends nothing stands at the left edge.
            place = (math.log10(amount) - low) / (high - low) if amount else 0.0
            x, y = left + place * (width - left - 90), height - bottom - (value - least) / span * (height - bottom - 30)
            marks.append(tag("circle", cx=round(x, 1), cy=round(y, 1), r=4))
            marks.append(tag("text", one["name"], x=round(x + 7, 1), y=round(y + 4, 1)))
        for power in range(math.ceil(low), math.floor(high) + 1):
            x = left + (power - low) / (high - low) * (width - left - 90)
            marks.append(tag("text", f"{10**power / 1e6:g} MB", x=round(x, 1), y=height - 10, text_anchor="middle"))
        panels.append(tag("g", *marks, transform=f"translate({shift * (width + 20)} 0)"))
    return tag("svg", *panels, viewBox=f"0 0 {2 * width + 20} {height}", role="img")


def _prepared(config: RunConfig, variant: Variant, parts: Parts) -> RunConfig:
    """The variant's block for all clients, with ranks of the same bytes if wanted; `dense` need not be in the run."""
    if variant.block is None:
        return config
    specs = {spec.name: spec for spec in config.blocks}
    if variant.block == "dense" and "dense" not in specs:
        specs["dense"] = BlockConfig(name="dense", method="dense")
    if variant.block not in specs:
        raise LegolmError(f"variant {variant.name}: block {variant.block!r} is not one of {', '.join(specs)}")
    path = resolve(config.model)
    base = Base.of(path, "", load_config(path))
    block_of = {client.id: client.block for client in _plan_of(config, parts).clients} if variant.match_bytes else {}

    def size(coverage: Coverage) -> int:
        return adapter_parameters(coverage, config.lora.targets, config.lora.rank)

    whole = size(planned_coverage(specs[variant.block], base))
    clients = []
    for client in config.clients:
        rank = client.rank
        if variant.match_bytes:
            share = size(planned_coverage(specs[block_of[client.id]], base)) / whole
            rank = max(1, min(config.lora.rank, round((rank or config.lora.rank) * share)))
        clients.append(client.model_copy(update={"block": variant.block, "profile": None, "rank": rank}))
    # The other blocks would only be cut.
    return config.model_copy(update={"clients": clients, "blocks": [specs[variant.block]]})


def _plan_of(config: RunConfig, parts: Parts) -> Plan:
    """The plan with a scheme that takes any block: the variant's own may not fit before its blocks are changed."""
    return make_plan(config.model_copy(update={"aggregate": AggregateConfig()}), parts)


def _trained(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Client and metrics of each training."""
    return [(record["client"], record["train"])] if record["stage"] == "local" else list(record["train"].items())


def _everyone(one: Record) -> float:
    """Mean over all (client, data set) pairs: own data is one of as many as there are clients."""
    count = one["clients"]
    others = one["others"] if one["others"] is not None else one["own"]
    return float((one["own"] + (count - 1) * others) / count)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _text(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column.startswith("bytes"):
        return f"{value / 1e6:.2f}"
    if column in ("flops", "memory"):
        return f"{value / (1e12 if column == 'flops' else 1e6):,.1f}"
    return f"{value:.3f}" if column in ("llm", "own", "others", "validation", "llm_validation") else f"{value:,.0f}"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2330;background:#fff}main{max-width:62rem;margin:2rem auto;
padding:0 1rem}
svg{width:100%;height:auto;font-size:11px}circle{fill:#2f6fde}.grid{stroke:#dde2ea}.name{font-weight:600}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-top:1px solid #dde2ea}
:is(th,td):nth-child(-n+2){text-align:left}
"""
