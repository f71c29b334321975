"""Is a block that is cut for a task better at it than one cut on general text?

    python benchmarks/task_blocks.py --task TRAIN.jsonl [TRAIN.jsonl ...] --test TEST.jsonl --general VALID.txt
        --text TEST.txt [--sparsity 0.5] [--method structured] [--model starter]

For each task two blocks of the same shape are cut: calibrated on its training conversations, and on the general text.
Both answer the task's test rows (those of TEST.jsonl whose `task` is the training file's), without any training; loss
in nats per answer token. Perplexity on the general test text is beside it. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from legolm.config import BlockConfig, CalibrationConfig, RowsConfig
from legolm.data import read_rows, read_text, render, to_example
from legolm.evaluation import perplexity, score
from legolm.models import fingerprint, load_model, load_tokenizer, resolve
from legolm.prune import cut_blocks
from legolm.system import Progress

SAMPLES, LENGTH, WINDOW, WINDOWS, MAX_LENGTH = 32, 512, 1024, 10, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--task", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="structured")
    options = parser.parse_args()
    base = resolve(options.model)
    tokenizer, print_ = load_tokenizer(base), fingerprint(base)
    ids = tokenizer.encode(read_text(options.text, "--text"), add_special_tokens=False, verbose=False)

    def figures(folder: Path, tests: dict[str, list[Any]]) -> dict[str, float]:
        model = load_model(folder, torch.bfloat16)
        found = {name: round(score(model, rows, 8, "bf16").loss, 3) for name, rows in tests.items()}
        return found | {"perplexity": round(perplexity(model, torch.tensor(ids), WINDOW, "bf16", WINDOWS), 2)}

    tests: dict[str, list[Any]] = {}
    tasks = {path: next(read_rows(str(path), "--task")).values["task"] for path in options.task}
    for row in read_rows(str(options.test), "--test"):
        if row.values["task"] in tasks.values():
            example = render(to_example(row, RowsConfig()), tokenizer, MAX_LENGTH)
            tests.setdefault(row.values["task"], []).append(example)
    rows = {"dense": figures(base, tests)}
    print("dense", rows["dense"], flush=True)
    for name, text in {"general": options.general, **{task: path for path, task in tasks.items()}}.items():
        calibration = CalibrationConfig(text=str(text), samples=SAMPLES, length=LENGTH)
        spec = BlockConfig(name="block", method=options.method, sparsity=options.sparsity, calibration=calibration)
        with tempfile.TemporaryDirectory() as folder:
            (block,) = cut_blocks(base, print_, [(spec, Path(folder) / "block")], 0, "bf16", Progress())
            rows[name] = figures(block.path, tests)
        print(f"cut on {name}", rows[name], flush=True)
    gain = {task: round(rows["general"][task] - rows[task][task], 3) for task in tasks.values()}
    print(
        json.dumps({"method": options.method, "sparsity": options.sparsity, "losses": rows, "gain_on_own_task": gain})
    )


if __name__ == "__main__":
    main()
