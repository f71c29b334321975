"""What becomes of blocks of different shape that were trained apart, composed into a larger one (the paper's figure 4)?

    python benchmarks/compose.py RUN --group snli,cola [--group snli,cola,wic] [--out FILE.json]

RUN is the folder of a run with `federation.mode: alone` and its final models; run from the folder that its data paths
are relative to. Each group of clients, and all of them, is composed into the union of what they hold and into the LLM,
by every method at its default settings. Losses are nats per answer token on the group's test data, means over its
clients' sets: of the LLM before, of each client's block on all of the group's sets (`apart`) and on its own alone
(`own`), and of what was composed. One thread. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from legolm.composition import choose_method, compose, plan
from legolm.data import load_parts, render
from legolm.evaluation import score
from legolm.models import choose_precision, dtype_of, load_model, load_tokenizer, resolve
from legolm.runs import RunDir
from legolm.system import Progress

METHODS = (("heteagg", "exact"), ("heteagg", "factor"), ("task_arithmetic", None), ("ties", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--group", action="append", default=[], help="client ids, with commas between")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = RunDir(options.run)
    config = run.known()
    ids = [client.id for client in config.clients]
    parts = load_parts(config.data, ids, config.seed)
    base, progress = resolve(config.model), Progress()
    tokenizer, precision = load_tokenizer(base), choose_precision(config.precision)
    sets = {id: [render(one, tokenizer, config.train.max_length) for one in parts[id].test] for id in ids}

    def losses(path: Path, group: list[str]) -> dict[str, float]:
        model = load_model(path, dtype_of(precision))
        return {id: score(model, sets[id], config.evaluate.batch_size, precision).loss for id in group}

    alone = {id: losses(run.final(id), ids) for id in ids}
    before = losses(base, ids)
    found: list[dict[str, Any]] = []
    for group in [*(one.split(",") for one in options.group), ids]:
        known = {
            "clients": group,
            "before": fmean(before[id] for id in group),
            "apart": fmean(alone[block][id] for block in group for id in group),
            "own": fmean(alone[id][id] for id in group),
            "composed": {},
        }
        found.append(known)
        made: dict[tuple[str, str, str | None], float] = {}  # with a dense block the union is the LLM
        for into in ("union", "llm"):
            for name, form in METHODS:
                sources = [str(run.final(id)) for id in group]
                wanted = plan(sources, into, None, choose_method(name, form, None, None), None, None, progress)
                key, label = (wanted.coverage.hash, name, form), f"{into}, {name}{f' ({form})' if form else ''}"
                if key not in made:
                    with tempfile.TemporaryDirectory() as folder:
                        compose(wanted, Path(folder) / "composed", progress)
                        made[key] = fmean(losses(Path(folder) / "composed", group).values())
                known["composed"][label] = made[key]
                print(f"{', '.join(group)}: {label} {known['composed'][label]:.3f}", flush=True)
                if options.out:
                    options.out.write_text(json.dumps({"groups": found}, indent=1) + "\n")
    print(json.dumps({"groups": found}))


if __name__ == "__main__":
    main()
