"""How fast does a client train, beside TRL's SFTTrainer and Hugging Face's Trainer? LoRA rank 8 on all linear layers.

    python benchmarks/train_speed.py [--data FILE.jsonl ...] [--model starter] [--steps 4] [--repeats 3]

Without `--data`: the starter data. Each variant trains on the same examples, 8 a step, in a process of its own with
one thread; variants take turns, the median of the repeats counts. Speed is non-padding tokens per CPU second after the
first step of the same training, which takes new memory. `ours` reads what all prompts of a batch begin with once, and
`ours-apart` in each row. Work is counted as 4 N per token that is read for the N weights of the frozen decoder
(forward, and backward to activations only) and 4 times the head's per answer token;
`fraction_of_matmul_peak` divides it by the speed of the best of some bare products, in bf16 or fp32, measured in the
same process before and after.

`loss` is the mean over all steps' training losses: the same rows, 8 a step (TRL with packing: as many as fill 1,024
tokens, so fewer steps see them all), in an order of each trainer's own.

TRL and its Trainer need `pip install -e '.[bench]'`; without them their rows are left out. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

BATCH, RANK, LEARNING_RATE, MAX_LENGTH, PACKED = 8, 8, 1e-3, 512, 1024
OURS = ("ours", "ours-apart", "ours-fp32", "ours-block", "ours-checkpointing")
OTHERS = ("trl-fp32", "trl-bf16", "trl-bf16-packed", "trl-bf16-checkpointing", "hf-fp32", "hf-bf16")


def examples(options: argparse.Namespace) -> list[Any]:
    """Rendered examples, alternating between the files (or between the starter data's languages)."""
    from legolm.config import RowsConfig
    from legolm.data import read_rows, render, to_example
    from legolm.data.starter import starter_parts
    from legolm.models import load_tokenizer, resolve

    if options.data:
        parts = [[to_example(row, RowsConfig()) for row in read_rows(file, "--data")] for file in options.data]
    else:
        parts = [list(part.train) for part in starter_parts("starter", seed=0).values()]
    tokenizer = load_tokenizer(resolve(options.model))
    wanted = BATCH * (options.steps + 1)
    mixed = [parts[i % len(parts)][i // len(parts)] for i in range(wanted)]
    return [render(example, tokenizer, MAX_LENGTH) for example in mixed]


def ours(variant: str, rows: list[Any], options: argparse.Namespace) -> dict[str, float]:
    import torch

    import legolm.finetune.loop as loop
    import train_peers
    from legolm.adapter import init_factors, slice_factors
    from legolm.block import Coverage, read_block
    from legolm.config import Precision, TrainConfig
    from legolm.finetune import Task
    from legolm.models import choose_precision, dtype_of, load_model, resolve, shape_of

    precision: Precision = "fp32" if variant == "ours-fp32" else choose_precision("auto", "cpu")
    path = Path(options.block) if variant == "ours-block" else resolve(options.model)
    model = load_model(path, dtype_of(precision))
    coverage = read_block(path).coverage if variant == "ours-block" else Coverage.full(shape_of(model.config))
    start = slice_factors(coverage, init_factors(coverage.shape, None, RANK, 0), RANK)
    config = TrainConfig(
        batch_size=BATCH, learning_rate=LEARNING_RATE, gradient_checkpointing=variant.endswith("checkpointing")
    )
    clock = Clock()
    peak = matmul_peak(torch)
    task = Task(model, coverage, start, 2.0, rows, config, precision, options.steps + 1, 0)
    with patch.object(loop, "shared_prompt", lambda *_: 0) if variant == "ours-apart" else nullcontext():
        metrics = train_peers.ours(task, clock.began, clock.read)
    cpu = clock.seconds()
    head = model.get_output_embeddings().weight.numel()
    work = 4 * (coverage.kept_weights * clock.tokens_read + head * clock.answers)
    peak = (peak + matmul_peak(torch)) / 2
    return {
        "tokens_per_cpu_s": clock.tokens / cpu,
        "loss": metrics["loss_first"],
        "fraction_of_matmul_peak": work / cpu / peak,
        "gflops": work / cpu / 1e9,
        "matmul_peak_gflops": peak / 1e9,
    }


class Clock:
    """CPU seconds and tokens from the second step on: the first takes new memory."""

    def __init__(self) -> None:
        self.tokens = self.answers = self.tokens_read = 0
        self._steps, self._began = 0, 0.0

    def began(self, tokens: int, answers: int) -> None:
        """A step begins."""
        self._steps += 1
        if self._steps == 2:
            self._began = time.process_time()
        if self._steps >= 2:
            self.tokens += tokens
            self.answers += answers

    def read(self, tokens: int) -> None:
        """The model reads so many tokens of the step that began."""
        if self._steps >= 2:
            self.tokens_read += tokens

    def seconds(self) -> float:
        """Until now."""
        return time.process_time() - self._began


def matmul_peak(torch: Any) -> float:
    """Best floating-point operations per CPU second of bare products of a decoder's sizes, in bf16 or fp32.

    A processor without bf16's instructions is several times faster in fp32.
    """
    best = 0.0
    sizes = ((1024, 576, 1536), (1024, 1536, 576), (1024, 2048, 2048))
    for dtype, (rows, inner, columns) in product((torch.bfloat16, torch.float32), sizes):
        x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for _ in range(8):
            began = time.process_time()
            torch.nn.functional.linear(x, w)
            best = max(best, 2 * rows * inner * columns / (time.process_time() - began))
    return best


def theirs(variant: str, rows: list[Any], options: argparse.Namespace) -> dict[str, float]:
    """TRL's or Hugging Face's trainer on the same token ids, the same order, no evaluation, no saving."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import train_peers
    from legolm.models import resolve

    base = resolve(options.model)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    packed = variant.endswith("packed")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1 if packed else BATCH,
        "max_steps": options.steps + 1,
        "learning_rate": LEARNING_RATE,
        "use_cpu": True,
        "bf16": "bf16" in variant,
        "gradient_checkpointing": variant.endswith("checkpointing"),
    }
    kind = variant.partition("-")[0]
    if kind == "trl":
        settings |= {"packing": packed, "max_length": PACKED if packed else MAX_LENGTH}
    clock = Clock()
    losses = train_peers.theirs(kind, model, tokenizer, rows, clock.began, RANK, settings)
    return {"tokens_per_cpu_s": clock.tokens / clock.seconds(), "loss": sum(losses) / len(losses)}


def one(options: argparse.Namespace) -> None:
    """In this process: one variant, once."""
    import torch

    torch.set_num_threads(1)
    rows = examples(options)
    found = (ours if options.variant in OURS else theirs)(options.variant, rows, options)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def cut(options: argparse.Namespace, out: Path) -> None:
    """A structured block of half the decoder's weights."""
    from legolm.config import BlockConfig, CalibrationConfig
    from legolm.models import choose_precision, fingerprint, resolve
    from legolm.prune import cut_blocks
    from legolm.system import Progress

    precision = choose_precision("auto", "cpu")
    base = resolve(options.model)
    calibration = CalibrationConfig(samples=8, length=128)
    spec = BlockConfig(name="half", method="structured", sparsity=0.5, calibration=calibration)
    cut_blocks(base, fingerprint(base), [(spec, out)], 0, precision, Progress())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--data", nargs="*", help="JSON lines with instruction and output")
    parser.add_argument("--steps", type=int, default=4, help="timed ones, after one of warming up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=[*OURS, *OTHERS])
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--block", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        one(options)
        return
    there = [variant for variant in options.variants if variant in OURS or variant.startswith("hf")]
    if importlib.util.find_spec("trl") is not None:
        there = options.variants
    if missing := set(options.variants) - set(there):
        print(f"left out, TRL is not installed: {', '.join(sorted(missing))}", flush=True)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in there}
    with tempfile.TemporaryDirectory(prefix="legolm-train-") as folder:
        cut(options, Path(folder) / "half")
        for repeat in range(options.repeats):
            for variant in there:
                command = [sys.executable, *sys.argv, "--variant", variant, "--block", f"{folder}/half"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                results[variant].append(json.loads(done.stdout.splitlines()[-1]))
                print(repeat, variant, {k: round(v, 3) for k, v in results[variant][-1].items()}, flush=True)

    def middle(field: str) -> dict[str, float]:
        return {
            variant: round(median(row[field] for row in rows), 3)
            for variant, rows in results.items()
            if field in rows[0]
        }

    speed, memory = middle("tokens_per_cpu_s"), middle("peak_rss_mb")

    def ratio(by: str, over: str, of: dict[str, float]) -> float | None:
        return round(of[by] / of[over], 3) if by in of and over in of else None

    print(
        json.dumps(
            {
                "tokens_per_cpu_s": speed,
                "ratio_vs_trl_fp32": ratio("ours", "trl-fp32", speed),
                "ratio_vs_trl_bf16": ratio("ours", "trl-bf16", speed),
                "ratio_vs_apart": ratio("ours", "ours-apart", speed),
                "ratio_block_vs_llm": ratio("ours-block", "ours", speed),
                "fraction_of_matmul_peak": middle("fraction_of_matmul_peak").get("ours"),
                "matmul_peak_gflops": middle("matmul_peak_gflops").get("ours"),
                "peak_rss_mb": memory,
                "memory_vs_trl_fp32": ratio("ours", "trl-fp32", memory),
                "loss": middle("loss"),
            }
        )
    )


if __name__ == "__main__":
    main()
