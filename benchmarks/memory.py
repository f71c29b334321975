"""Does the memory that `--dry-run` plans for a client hold? Peak of a real fine-tuning process against the estimate.

    python benchmarks/memory.py [--model starter]

One fresh process a row (the whole LLM, two batch sizes and lengths). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

CASES = [(8, 40), (8, 128), (16, 128), (4, 512), (2, 2048)]


def measure(model: str, batch_size: int, length: int) -> dict[str, float]:
    """Train two steps in this process; (peak resident, estimate) in bytes."""
    import torch

    from legolm.adapter import init_factors
    from legolm.block import Coverage
    from legolm.config import LoraConfig, TrainConfig
    from legolm.data import Tokens
    from legolm.finetune import Task, fit
    from legolm.models import count_parameters, load_config, load_model, resolve, shape_of
    from legolm.plan.needs import training_bytes

    base = resolve(model)
    config = load_config(base)
    coverage = Coverage.full(shape_of(config))
    lora, train = LoraConfig(), TrainConfig(batch_size=batch_size)
    start = init_factors(coverage.shape, lora.targets, lora.rank, 0)
    ids = tuple(int(token) for token in torch.randint(100, (length,)))
    examples = [Tokens(ids, length - 8)] * 32
    fit(Task(load_model(base, torch.bfloat16), coverage, start, lora.scaling, examples, train, "bf16", steps=2, seed=0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned = training_bytes(coverage, count_parameters(base), config.vocab_size, length, train, lora, "bf16")
    return {
        "batch_size": batch_size,
        "length": length,
        "peak_mb": round(peak / 1e6),
        "planned_mb": round(planned / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.model, *options.case)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--model", options.model, "--case", *map(str, case)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
