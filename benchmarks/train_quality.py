"""Is bf16 as good as fp32 after equal steps, and is training under the mask better than masking at the merge?

    python benchmarks/train_quality.py [--data FILE.jsonl ...] [--model starter] [--steps 24] [--seeds 3]

Without `--data`: the starter data. Losses are per answer token on held-out examples, of the model as it would be
deployed, scored in fp32. Pairs share the seed: the start, the examples and their order. `masked` and `unmasked` train a
SparseGPT block of half the weights, with the masked forward or with plain LoRA, and both merge under the mask.
`rounding` merges an adapter of one step into bfloat16 weights, to the nearest and stochastically, beside float32. One
thread. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from legolm.adapter import init_factors, merged
from legolm.block import Coverage
from legolm.config import BlockConfig, CalibrationConfig, Precision, RowsConfig, TrainConfig
from legolm.data import read_rows, render, to_example
from legolm.data.starter import starter_parts
from legolm.evaluation import score
from legolm.finetune import Task, fit
from legolm.models import dtype_of, fingerprint, load_model, load_tokenizer, resolve, shape_of
from legolm.prune import cut_blocks
from legolm.system import Progress

BATCH, RANK, HELD_OUT = 8, 8, 64


def split(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """(training, held-out) examples, all files or languages mixed."""
    tokenizer = load_tokenizer(resolve(options.model))
    if options.data:
        rows = [to_example(row, RowsConfig()) for row in read_rows(options.data, "--data")]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held, train = [rows[i] for i in order[:HELD_OUT]], [rows[i] for i in order[HELD_OUT:]]
    else:
        parts = starter_parts("starter", seed=0).values()
        train = [example for part in parts for example in part.train]
        held = [part.test[i] for part in parts for i in range(HELD_OUT // len(parts))]
    return tuple([render(row, tokenizer, 512) for row in part] for part in (train, held))  # type: ignore[return-value]


def trained(
    path: Path, real: Coverage, trains: Coverage, precision: Precision, seed: int, data: Any, options: Any
) -> tuple[float, float]:
    """(held-out loss after training with coverage `trains` and merging with `real`, tokens per CPU second)."""
    train, held = data
    model = load_model(path, dtype_of(precision))
    start = init_factors(real.shape, None, RANK, seed)
    config = TrainConfig(batch_size=BATCH, learning_rate=options.learning_rate)
    began = time.process_time()
    delta, metrics = fit(Task(model, trains, start, 2.0, train, config, precision, options.steps, seed))
    speed = metrics["tokens"] / (time.process_time() - began)
    factors = {key: tensor + delta[key] for key, tensor in start.items()}
    with merged(load_model(path), real, factors, 2.0) as whole:
        return score(whole, held, 16, "fp32").loss, speed


def rounding(path: Path, real: Coverage, data: Any) -> dict[str, float]:
    """Held-out losses with an adapter of one step, by what its merge was rounded to."""
    train, held = data
    start = init_factors(real.shape, None, RANK, 0)
    config = TrainConfig(batch_size=BATCH, learning_rate=1e-3)
    model = load_model(path, torch.bfloat16)
    delta, _ = fit(Task(model, real, start, 2.0, train, config, "bf16", steps=1, seed=0))
    factors = {key: tensor + delta[key] for key, tensor in start.items()}
    with merged(load_model(path), real, factors, 2.0) as whole:
        exact = score(whole, held, 16, "fp32").loss
        nearest = score(whole, held, 16, "bf16").loss  # autocast rounds so
    with merged(load_model(path, torch.bfloat16), real, factors, 2.0) as whole:
        stochastic = score(whole, held, 16, "bf16").loss
    return {"float32": round(exact, 4), "nearest": round(nearest, 4), "stochastic": round(stochastic, 4)}


def compare(name: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, Any]:
    """Losses and speeds of both sides, and the mean and standard error of the paired difference of losses."""
    gaps = [one[0] - other[0] for one, other in pairs]
    first, second = name.split(" minus ")
    return {
        first: [round(one[0], 4) for one, _ in pairs],
        second: [round(other[0], 4) for _, other in pairs],
        "gap": round(fmean(gaps), 4),
        "gap_standard_error": round(stdev(gaps) / len(gaps) ** 0.5, 4) if len(gaps) > 1 else None,
        "tokens_per_cpu_s": {
            first: round(fmean(one[1] for one, _ in pairs), 1),
            second: round(fmean(other[1] for _, other in pairs), 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--data", nargs="*", help="JSON lines with instruction and output")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the masked pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, data = resolve(options.model), split(options)
    full = Coverage.full(shape_of(load_model(base).config))
    found: dict[str, Any] = {"steps": options.steps, "before": {}}
    found["before"]["llm"] = round(score(load_model(base), data[1], 16, "fp32").loss, 4)
    found["rounding"] = rounding(base, full, data)
    with tempfile.TemporaryDirectory(prefix="legolm-quality-") as folder:
        calibration = CalibrationConfig(samples=16, length=128)
        spec = BlockConfig(name="sparse", method="sparsegpt", sparsity=0.5, calibration=calibration)
        [block] = cut_blocks(base, fingerprint(base), [(spec, Path(folder) / "sparse")], 0, "bf16", Progress())
        found["before"]["block"] = round(score(load_model(block.path), data[1], 16, "fp32").loss, 4)
        print(found, flush=True)
        precisions, masks = [], []
        unmasked = replace(block.coverage, masks={})
        for seed in range(options.seeds):
            both = [trained(base, full, full, kind, seed, data, options) for kind in ("bf16", "fp32")]
            precisions.append((both[0], both[1]))
            print(seed, "bf16, fp32", both, flush=True)
            both = [
                trained(block.path, block.coverage, trains, options.precision, seed, data, options)
                for trains in (block.coverage, unmasked)
            ]
            masks.append((both[0], both[1]))
            print(seed, "masked, unmasked", both, flush=True)
    found |= {"bf16_minus_fp32": compare("bf16 minus fp32", precisions)}
    found |= {"masked_minus_unmasked": compare("masked minus unmasked", masks)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
