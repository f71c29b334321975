"""What else could the server have done with the updates of a run's first round?

    python benchmarks/server_step.py RUN [--out FILE.json]

RUN is the folder of a run with `federation.keep_updates`; run from the folder that its data paths are relative to. The
clients' first updates do not depend on what the server does with them, so each row is what a run with that setting
would have after one round, exactly: other server learning rates, and the other denominator. Losses are the LLM's on
validation data, nats per answer token, means over the clients' sets. One thread. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

from legolm.adapter import merged
from legolm.data import load_parts, render
from legolm.evaluation import score
from legolm.federate.server import Rounds
from legolm.models import choose_precision, dtype_of, load_model, load_tokenizer
from legolm.runs import RunDir
from legolm.system import Progress, read_json
from results_read import opened

RATES = (0.5, 0.7, 1.4, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, summary = RunDir(options.run), read_json(options.run / "summary.json")
    config, blocks = opened(options.run)
    base = blocks["llm"].path
    block_of = {client["id"]: client["block"] for client in summary["clients"]}
    tokenizer, precision = load_tokenizer(base), choose_precision(config.precision)
    parts = load_parts(config.data, list(block_of), config.seed)
    data = [
        [render(example, tokenizer, config.train.max_length) for example in parts[id].validation] for id in block_of
    ]
    model = load_model(base, dtype_of(precision))

    cases: dict[str, tuple[str, ...]] = {"as it was": ()}
    cases |= {f"server learning rate {rate}": (f"aggregate.server_learning_rate={rate}",) for rate in RATES}
    other = "global_fill" if config.aggregate.settings["denominator"] == "coverage_mean" else "coverage_mean"
    cases[f"denominator {other}"] = (f"aggregate.denominator={other}",)

    found = {}
    for label, changes in cases.items():
        changed, _ = opened(options.run, *changes)
        scheme = Rounds(run, changed, summary["run_id"], blocks, block_of, Progress()).replay(1, ())
        factors = scheme.adapter(blocks["llm"].coverage, config.lora.rank)
        with merged(model, blocks["llm"].coverage, factors, config.lora.scaling) as whole:
            found[label] = fmean(score(whole, part, config.evaluate.batch_size, precision).loss for part in data)
        print(f"{label:28s} {found[label]:.3f}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
