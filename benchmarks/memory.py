"""Does the memory that a plan reckons with hold? Peak of a real fine-tuning process against `training_bytes`.

    python benchmarks/memory.py [--model starter] [--only NAME ...]

One fresh process a shape, one after the other: the whole LLM, a block of half of it and an unstructured block; both
precisions; short and long batches; with checkpointing; few layers. Last line: one JSON object with each shape's
planned and measured peak (MB, 1e6 bytes), their ratio, and the largest deviation from 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from legolm.config import Precision


@dataclass(frozen=True)
class Case:
    """A block, and how it trains: examples of one length, all of a batch at once."""

    block: str
    precision: Precision
    batch: int
    length: int
    checkpointing: bool = False
    last_layers: int | None = None


CASES = {
    "dense-fp32-1x128": Case("dense", "fp32", 1, 128),
    "dense-fp32-8x128": Case("dense", "fp32", 8, 128),
    "dense-fp32-1x512": Case("dense", "fp32", 1, 512),
    "dense-bf16-1x128": Case("dense", "bf16", 1, 128),
    "dense-bf16-8x128": Case("dense", "bf16", 8, 128),
    "dense-bf16-8x512": Case("dense", "bf16", 8, 512),
    "dense-bf16-8x128-checkpointing": Case("dense", "bf16", 8, 128, checkpointing=True),
    "dense-bf16-8x512-checkpointing": Case("dense", "bf16", 8, 512, checkpointing=True),
    "dense-bf16-8x128-last-10-layers": Case("dense", "bf16", 8, 128, last_layers=10),
    "half-fp32-8x128": Case("half", "fp32", 8, 128),
    "half-bf16-8x128": Case("half", "bf16", 8, 128),
    "half-bf16-8x128-checkpointing": Case("half", "bf16", 8, 128, checkpointing=True),
    "sparse-bf16-8x128": Case("sparse", "bf16", 8, 128),
}


def cut_blocks(model: str, folder: Path) -> None:
    """Blocks of about half the decoder's weights, cut without calibration: peaks depend on shapes alone."""
    import legolm
    from legolm.models import load_config, resolve, shape_of

    llm, shape = legolm.LLM(model), shape_of(load_config(resolve(model)))
    groups = max(1, 2 * shape.kv_groups // 3)
    legolm.cut(
        llm, folder / "half", method="window", num_key_value_heads=groups, intermediate_size=4 * shape.neurons // 9
    )
    legolm.cut(llm, folder / "sparse", method="magnitude", sparsity=0.5)


def peak_bytes() -> int:
    """Of this process. Linux only: getrusage would count the memory of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(model: str, folder: Path, case: Case) -> dict[str, float]:
    """Train two steps in this process; peaks, and what was planned, in MB."""
    import torch

    from legolm.adapter import adapter_keys, init_factors, slice_factors
    from legolm.block import Coverage, decoder_weights, read_block
    from legolm.config import LoraConfig, TrainConfig
    from legolm.data import Tokens
    from legolm.finetune import Task, fit
    from legolm.models import CHUNK, count_parameters, dtype_of, layout_of, load_config, load_model, resolve, shape_of
    from legolm.plan.needs import Settings, Trainee, training_bytes

    base = resolve(model)
    config, lora = load_config(base), LoraConfig()
    path = base if case.block == "dense" else folder / case.block
    coverage = Coverage.full(shape_of(config)) if case.block == "dense" else read_block(path).coverage
    trains = coverage.within(coverage.layers[-case.last_layers :]) if case.last_layers else coverage
    train = TrainConfig(
        batch_size=case.batch, micro_batch_tokens=1 << 20, gradient_checkpointing=case.checkpointing, steps=2
    )
    net = load_model(path, dtype_of(case.precision))
    factors = slice_factors(trains, init_factors(coverage.shape, lora.targets, lora.rank, 0), lora.rank)
    start = {key: factors[key] for key in adapter_keys(trains, lora.targets)}
    del factors
    ids = torch.randint(100, (32, case.length)).tolist()
    examples = [Tokens(tuple(one), case.length - min(CHUNK, case.length // 2)) for one in ids]
    fit(Task(net, coverage, start, lora.scaling, examples, train, case.precision, steps=2, seed=0))
    peak = peak_bytes()
    trainee = Trainee(
        coverage,
        trains,
        others=count_parameters(base) - decoder_weights(coverage.shape),
        vocabulary=config.vocab_size,
        width=(config.dtype or torch.float32).itemsize,
        targets=lora.targets,
        rank=lora.rank,
        masked=bool(coverage.masks),
        layout=layout_of(config),
    )
    settings = Settings(train.micro_batch_tokens, train.gradient_checkpointing)
    planned = training_bytes(trainee, [case.length] * case.batch, settings, case.precision)
    return {
        "measured_mb": round(peak / 1e6),
        "planned_mb": round(planned / 1e6),
        "ratio": round(planned / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--only", nargs="*", choices=CASES, help="names of shapes; all if not given")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=Path, help="folder of the cut blocks; kept between calls if given")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.model, options.blocks, CASES[options.case])))
        return
    shapes: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.blocks or Path(scratch)
        names = options.only or list(CASES)
        if any(CASES[name].block != "dense" for name in names):
            cut_blocks(options.model, folder)
        for name in names:
            command = [sys.executable, __file__, "--model", options.model, "--blocks", str(folder), "--case", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            shapes[name] = {**asdict(CASES[name]), **found}
            print(name, found, flush=True)
    ratios = [float(str(one["ratio"])) for one in shapes.values()]
    print(json.dumps({"shapes": shapes, "largest_deviation": round(max(abs(ratio - 1) for ratio in ratios), 3)}))


if __name__ == "__main__":
    main()
