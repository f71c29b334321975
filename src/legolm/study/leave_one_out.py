"""Leave one out (the paper's figure 5): replay a run's aggregation without a block's clients, or without one client.

The updates are those that the run kept; the others' are what they were while the left-out ones still took part. All
losses are nats per answer token on test data. A block's is the mean over all clients' data, each set counting the same,
so that what is lost and what the federation gained over local-only training are in one measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from legolm.adapter import merged
from legolm.aggregate import Scheme
from legolm.block import Block, llm_block, read_block
from legolm.config import RunConfig
from legolm.data import client_data, data_fingerprint
from legolm.errors import LegolmError
from legolm.evaluate import TEXT, Figure, Questions, check_finite, compare, digest
from legolm.evaluate import measure as measure_all
from legolm.federate.server import Rounds
from legolm.federate.transport import Exchange, run_local
from legolm.models import choose_device, choose_precision, dtype_of, fingerprint, load_model, load_tokenizer, resolve
from legolm.report import Raw, tag, wide_enough
from legolm.report.summary import scores_of
from legolm.runs import Identity, RunDir, read_record
from legolm.system import Progress, atomic_write, read_json

Record = dict[str, Any]
Measure = Callable[[Scheme], dict[str, Figure]]


def ablate(folder: Path, out: Path, questions: Questions | None, progress: Progress) -> Record:
    """Write `ablation.json` and `ablation.html` into `out`, after each left-out one anew, and give the former.

    `gain` is the mean loss of the clients' blocks trained alone minus that of the same blocks with the global update
    (None where the run did not train alone); `cost` of a block is their mean loss without its clients' updates minus
    that with all. `cost_llm` is the same of the LLM, which also answers the `questions`. Raises `LegolmError` for a run
    without kept updates.
    """
    run = RunDir(folder)
    config = _config(run)
    identity = read_record(folder / "run.json", Identity).model_dump()
    last, block_of = _finished(folder / "summary.json", config)
    if not last:
        raise LegolmError(f"run folder {folder}: no round beat its start, which it kept; there is nothing to leave out")
    if data_fingerprint(client_data(config)) != identity["data_fingerprint"]:
        raise LegolmError(f"run folder {folder}: the data changed since the run; its losses are of other questions")
    what = {"run": identity["run"], "round": last, "questions": _identify(questions)}
    found = _earlier(out / "ablation.json", what)
    blocks = _blocks(run, config, identity["base_fingerprint"])
    rounds = Rounds(run, config, identity["run"], blocks, block_of, progress)
    asked = _figures_of(config, blocks["llm"], questions)

    @cache
    def with_all() -> dict[str, Figure]:
        return asked(rounds.scheme(last))

    records = [one.model_dump() for one in rounds.records()]
    by_round = {one["round"]: one for one in records if one["stage"] == "round"}
    alone = [{"clients": [one["client"]], "scores": one["scores"]} for one in records if one["stage"] == "local"]
    found |= {
        "name": folder.resolve().name,
        "before": found.get("before") or _losses(by_round[0], asked(rounds.scheme(0))),
        "local": _losses({"held": alone}, {}) if alone else None,
        "all": found.get("all") or _losses(by_round[last], with_all()),
    }

    def body(exchange: Exchange) -> None:
        done = {tuple(one["clients"]): one for one in found["without"]}
        found["without"] = []
        for kind, name, clients in _cases(block_of):
            if tuple(clients) not in done:
                scheme = rounds.replay(last, clients)
                record = rounds.score_global(scheme, exchange, f"without {name}: evaluate").model_dump()
                figures = asked(scheme)
                done[tuple(clients)] = _losses(record, figures) | {
                    "paired": {name: _paired(figure, with_all()[name]) for name, figure in figures.items()}
                }
            found["without"].append(done[tuple(clients)] | {"kind": kind, "name": name, "clients": clients})
            _write(found, out)

    run_local(run, config, 1, body)
    return found


def print_ablation(found: Record, out: Path) -> None:
    """The table, and where the page is."""
    measures = _measures(found)
    table = Table(box=None, pad_edge=False)
    for column in ("left out", "", *(text for measure in measures for text in (_name(measure), "more"))):
        table.add_column(column, justify="right" if len(table.columns) > 1 else "left")
    for one in found["without"]:
        cells = [text for m in measures for text in (f"{one[m]:.3f}", _more(one, found["all"], m))]
        table.add_row(one["kind"], one["name"], *cells)
    for stage, name in _LINES.items():
        if found[stage]:
            table.add_row("", name, *(text for m in measures for text in (_number(found[stage].get(m)), "")))
    console = wide_enough(table)
    console.print("Loss per answer token (nats) on all clients' test data without one block, without one client", table)
    console.print(f"{_verdict(found)}\npage {out / 'ablation.html'}", highlight=False, soft_wrap=True)


def page(found: Record) -> str:
    """One self-contained HTML page: figure 5 for the blocks, for the LLM and for its perplexity."""
    body = (
        tag("h1", f"{found['name']}: one left out"),
        tag("p", _verdict(found)),
        *(tag("section", tag("h2", _name(measure)), plot(found, measure)) for measure in _measures(found)),
        tag(
            "p",
            f"Updates of rounds 1 to {found['round']} as the run kept them, added again without those of the left-out "
            "clients. Losses are nats per answer token, the mean over all clients’ test data; of blocks, the mean over "
            "all clients’ blocks, the left-out ones too. Whiskers: one standard error. A bar under the pointer shows "
            "the difference to all together, with the p of the paired test on the same questions.",
        ),
    )
    top = (Raw('<meta charset="utf-8">'), tag("title", found["name"]), tag("style", Raw(_STYLE)))
    return f'<!doctype html>\n<html lang="en">{tag("head", *top)}{tag("body", tag("main", *body))}</html>\n'


def plot(found: Record, measure: str) -> Raw:
    """A bar for each left-out block and client from zero, and lines for local-only training and the global update."""
    bars = found["without"]
    # Not the one from before training: it would be far above all others.
    stages = [stage for stage in ("local", "all") if measure in (found[stage] or {})]
    lines = {_LINES[stage]: found[stage][measure] for stage in stages}
    wide, tall, left, step = 52 * len(bars) + 190, 250, 44, 52
    spreads = [one.get("stderr", {}).get(measure) or 0.0 for one in bars]
    values = [one[measure] for one in bars]
    most = max(0.0, *lines.values(), *(v + spread for v, spread in zip(values, spreads, strict=True))) or 1.0
    least = min(0.0, *(v - spread for v, spread in zip(values, spreads, strict=True)))

    def y(value: float) -> float:
        return round(float(tall - 70 - (tall - 100) * (value - least) / (most - least)), 1)

    marks = []
    for i, (one, spread) in enumerate(zip(bars, spreads, strict=True)):
        x, value = left + i * step, one[measure]
        middle = x + (step - 14) / 2
        said = f"{value:.4f} ± {spread:.4f}" if spread else f"{value:.4f}"
        title = tag("title", f"without {one['kind']} {one['name']}: {said} ({_more(one, found['all'], measure)})")
        size = {"width": step - 14, "height": round(abs(y(0) - y(value)), 1)}
        marks += [
            tag("rect", title, x=x, y=min(y(0), y(value)), class_=one["kind"], **size),
            tag("text", f"{value:.4g}", x=middle, y=y(value + spread) - 4, text_anchor="middle"),
            tag("text", one["name"][:14], x=x + 8, y=tall - 56, transform=f"rotate(30 {x + 8} {tall - 56})"),
        ]
        if spread:
            ends = {"y1": y(value - spread), "y2": y(value + spread)}
            marks.append(tag("line", x1=middle, x2=middle, class_="spread", **ends))
    end, free = left + len(bars) * step, tall - 10.0
    for name, value in sorted(lines.items(), key=lambda line: line[1]):
        free = min(y(value) + 4, free - 13)  # names of lines that are close go above each other
        marks += [
            tag("line", x1=left - 6, x2=end, y1=y(value), y2=y(value), class_="line"),
            tag("text", f"{name} {value:.4g}", x=end + 6, y=free),
        ]
    marks.append(tag("line", x1=left - 6, x2=end, y1=y(0), y2=y(0), class_="axis"))
    return tag("svg", *marks, viewBox=f"0 0 {wide} {tall}", role="img", aria_label=_name(measure))


def _more(one: Record, shared: Record, measure: str) -> str:
    """How much more than with all, and the paired test's p where there is one."""
    paired = one.get("paired", {}).get(measure)
    return f"{one[measure] - shared[measure]:+.3f}" + (f", p {paired['p']:.2g}" if paired else "")


def _measures(found: Record) -> list[str]:
    return [measure for measure in found["all"] if measure not in ("by_client", "stderr")]


def _name(measure: str) -> str:
    return {"blocks": "blocks' loss", "llm": "the LLM's loss"}.get(measure, f"the LLM's {measure}")


_LINES = {"before": "before", "local": "local only", "all": "global update"}


def _config(run: RunDir) -> RunConfig:
    """The run's. Raises `LegolmError` for a run that nothing can be left out of."""
    where = f"run folder {run.path}"
    if not run.config_file.is_file():
        raise LegolmError(f"{where}: no config.yaml; give the folder of a run")
    config = run.config()
    if config.federation.mode != "federated":
        raise LegolmError(f"{where}: mode {config.federation.mode!r} aggregates no updates; there is none to leave out")
    if not config.federation.keep_updates:
        raise LegolmError(f"{where}: its updates were not kept; run it anew with --set federation.keep_updates=true")
    if not (run.path / "summary.json").is_file():
        raise LegolmError(f"{where}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    return config


def _finished(path: Path, config: RunConfig) -> tuple[int, dict[str, str]]:
    """The round that a finished run kept for the blocks, and each client's block."""
    found = read_json(path, "best_round", "clients")
    try:
        last, block_of = found["best_round"], {client["id"]: client["block"] for client in found["clients"]}
    except (TypeError, KeyError):
        last, block_of = None, {}
    ids, names = [client.id for client in config.clients], {block.name for block in config.blocks}
    fits = list(block_of) == ids and names >= set(block_of.values())
    if not fits or last not in range(config.federation.rounds + 1):
        raise LegolmError(f"{path}: its clients or best_round are not the config's; write it anew: legolm run --resume")
    return last, block_of


def _blocks(run: RunDir, config: RunConfig, wanted: str) -> dict[str, Block]:
    base = resolve(config.model)
    if fingerprint(base) != wanted:
        raise LegolmError(f"run folder {run.path}: the model changed since the run; its updates are for another one")
    return {"llm": llm_block(base, wanted)} | {one.name: read_block(run.block(one.name)) for one in config.blocks}


def _cases(block_of: Mapping[str, str]) -> list[tuple[str, str, list[str]]]:
    """(kind, name, clients) of what is left out: each block that somebody has, then each client."""
    names = dict.fromkeys(block_of.values())
    blocks = [("block", name, [id for id, own in block_of.items() if own == name]) for name in names]
    return blocks + [("client", id, [id]) for id in block_of]


def _losses(record: Mapping[str, Any], figures: Mapping[str, Figure]) -> Record:
    """Mean losses of what `Rounds.score_global` gives: of the LLM, of each client's block, and of all blocks.

    And the LLM's other figures, with their standard errors.
    """
    by_client = {id: fmean(one["loss"] for one in scores.values()) for id, scores in scores_of(record).items()}
    found: Record = {"blocks": fmean(by_client.values()), "by_client": by_client}
    if "llm" in record:
        found["llm"] = fmean(one["loss"] for one in record["llm"].values())
    found |= {name: figure.value for name, figure in figures.items()}
    return found | {"stderr": {name: figure.stderr for name, figure in figures.items()}}


def _paired(figure: Figure, other: Figure) -> Record | None:
    """The paired test against the global update, question by question."""
    comparison = compare(figure, other)
    return None if comparison is None else asdict(comparison)


def _figures_of(config: RunConfig, llm: Block, questions: Questions | None) -> Measure:
    """A function that gives the LLM's figures with a scheme's global adapter."""
    if questions is None:
        return lambda scheme: {}
    precision = choose_precision(config.precision, config.device)
    tokenizer = load_tokenizer(llm.path)
    model = load_model(llm.path, dtype_of(precision)).to(choose_device(config.device))

    def measure(scheme: Scheme) -> dict[str, Figure]:
        factors = scheme.adapter(llm.coverage, config.lora.rank)
        with merged(model, llm.coverage, factors, config.lora.scaling) as whole:
            figures = measure_all(whole, tokenizer, questions, precision)
        check_finite(figures, "the LLM with the global update")
        found = ((task, name, figure) for task, of_task in figures.items() for name, figure in of_task.items())
        return {name if task == TEXT else f"{task} {name}": figure for task, name, figure in found}

    return measure


def _identify(questions: Questions | None) -> str | None:
    """What the LLM's figures stand on."""
    if questions is None:
        return None
    tasks = questions.tasks.asked(questions.limit) if questions.tasks else None
    return digest([tasks, questions.limit, questions.text, questions.length])


def _earlier(path: Path, what: Record) -> Record:
    """What an earlier call left. Raises `LegolmError` for another run's, one with other questions, and a broken one."""
    if not path.exists():
        return {"without": []} | what
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        [(one["clients"], one["blocks"], one["llm"]) for one in found["without"]]
        [(found[stage]["blocks"], found[stage]["llm"]) for stage in ("before", "all")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LegolmError(f"{path}: is broken ({error!r}); delete it, or give another --out") from None
    if found.get("run") != what["run"]:
        raise LegolmError(f"--out {path.parent}: holds the ablation of another run; give another folder")
    if found.get("questions") != what["questions"]:
        raise LegolmError(f"--out {path.parent}: holds an ablation with other questions; give another folder")
    return found


def _write(found: Record, out: Path) -> None:
    """Add what follows from the losses, and write both files."""
    shared, alone = found["all"], found["local"]
    found["gain"] = alone["blocks"] - shared["blocks"] if alone else None
    for name, kind, measure in (
        ("cost", "block", "blocks"),
        ("cost_clients", "client", "blocks"),
        ("cost_llm", "block", "llm"),
    ):
        left_out = [one for one in found["without"] if one["kind"] == kind]
        found[name] = {one["name"]: one[measure] - shared[measure] for one in left_out}
    atomic_write(out / "ablation.json", json.dumps(found, indent=1) + "\n")
    atomic_write(out / "ablation.html", page(found))


def _verdict(found: Record) -> str:
    """Gain and dearest block in words."""
    name, most = max(found["cost"].items(), key=lambda one: one[1])
    words = f"The dearest block to leave out is {name}: {most:+.3f} nats for the clients' blocks on all data."
    if found["gain"] is None:
        return words + " This run has no local-only baseline."
    gained = "less" if found["gain"] >= 0 else "more"
    return words + f" With the global update they have {abs(found['gain']):.3f} {gained} than with local-only training."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2330;background:#fff}main{max-width:62rem;margin:2rem auto;
padding:0 1rem}h2{font-size:1.1rem}
svg{max-width:100%;height:auto;font-size:11px}.block{fill:#2f6fde}.client{fill:#9dbcf2}
.axis,.spread{stroke:#1d2330}.line{stroke:#c2410c;stroke-dasharray:5 3}
"""
