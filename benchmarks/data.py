"""A gigabyte of JSON lines, read, split over eight clients and tokenized: speed, memory, and the tokenizer alone.

python benchmarks/data.py            # --mb 100 for a smaller trial

The rows are made here, of the sentences of Python's help topics: an instruction, sometimes what stands beside it, and
an answer. All tokens of all clients are held at the end, as in a run. `speed_over_tokenizer` compares with the same
tokenizer on the same text (every tenth row of it), in batches and with nothing around it. `peak_mb` is of this process
and of the one that renders chat templates.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil

from legolm.config import DataConfig, Split
from legolm.data import load_parts, read_rows, tokenize
from legolm.models import load_tokenizer, resolve

EVERY = 10
"""Of the rows, one in so many is what the tokenizer alone is timed on."""
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="size of the file")
    parser.add_argument("--model", default="starter", help="whose tokenizer and chat template")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve(options.model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write(path, options.mb * 1_000_000)
        before = peak_mb()
        began = time.perf_counter()
        config = DataConfig(train=str(path), split=Split(by="iid"))
        parts = load_parts(config, [f"client-{number}" for number in range(options.clients)], 0)
        read = time.perf_counter() - began
        held = [tokenize(getattr(one, split), tokenizer, 512) for one in parts.values() for split in SPLITS]
        seconds = time.perf_counter() - began
        assert sum(map(len, held)) == rows
        peak = peak_mb()
        alone = alone_seconds(path, tokenizer)
    result = {
        "mb": options.mb,
        "rows": rows,
        "tokens": sum(one.tokens for one in held),
        "read_seconds": round(read, 1),
        "seconds": round(seconds, 1),
        "mb_per_s": round(options.mb / seconds, 2),
        "peak_mb": round(peak),
        "before_mb": round(before),
        "speed_over_tokenizer": round(alone / seconds, 3),
    }
    print(json.dumps(result))


SPLITS = ("train", "validation", "test")


def write(path: Path, size: int) -> int:
    """Rows until there are so many bytes; how many."""
    drawn, written, count = random.Random(0), 0, 0
    sentences = [one.strip() for text in topics.values() for one in re.split(r"(?<=[.:])\s+", text) if len(one) > 20]
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            row = {
                "instruction": f"{drawn.choice(sentences)} What follows from {drawn.randrange(10**6)}?",
                "input": drawn.choice(sentences) if drawn.random() < 0.3 else "",
                "output": " ".join(drawn.choices(sentences, k=drawn.randint(2, 12))),
            }
            written += file.write(json.dumps(row) + "\n")
            count += 1
    return count


def alone_seconds(path: Path, tokenizer: Any) -> float:
    """What the tokenizer takes for the text of all rows, by every tenth."""
    rows = [row for place, row in enumerate(read_rows(str(path), "data")) if place % EVERY == 0]
    texts = [f"{row['instruction']}\n\n{row['input']}\n{row['output']}" for row in rows]
    began = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        tokenizer(texts[start : start + BATCH], add_special_tokens=False, return_attention_mask=False)
    return (time.perf_counter() - began) * EVERY


def peak_mb() -> float:
    """Of this process and its children, in 1e6 bytes."""
    children = sum(int(peak_of(child.pid)) for child in psutil.Process().children())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + children) / 1e6


def peak_of(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
