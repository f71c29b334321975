"""On one GPU, in under six minutes: is what legolm computes there right, and how fast does it train beside TRL?

    python benchmarks/gpu.py [--small] [--device cuda] [--parts checks legolm trl trl+liger]

`checks` compares fit, cut, merge and score on the device with the CPU (`gpu_checks.py`). The other parts train LoRA
rank 8 on all linear layers of random weights, in the shape of SmolLM2-135M and in one of 1.5 billion, dense and as a
`half` block (half of the MLP's neurons): the same rows of random tokens, 64 to 448 long, half of each learned; bf16
weights; about 8,192 tokens a step in one forward and backward pass, no gradient checkpointing. TRL packs rows of 1,024:
with flash-attn where it is installed, else as `wrapped` ones, whose examples see each other, for its packing without
cross-talk would take a mask over all 8,192 tokens. Speed is the median of the steps after the warm-up, counted in
tokens that are no padding; peak memory is what torch allocated at once in all steps (null on a CPU).

Each part is a process of its own with a time limit; what fails is in the last line with its error, and the rest goes
on. The first run on a machine also compiles liger's kernels.
Without CUDA, or with `--small`: toy shapes, which show that the script works, and nothing else.

A fresh machine with Python 3.11 or newer, torch with CUDA and a PyPI mirror, no hub (nothing is downloaded):

    git clone REPOSITORY legolm && cd legolm
    python -m pip install --no-deps -e .
    python -m pip install "transformers>=5.0,<6" "peft>=0.18" "accelerate>=1.0" "safetensors>=0.5" "numpy>=1.26" \\
        "psutil>=5.9" "pydantic>=2.7,<3" "pyyaml>=6" "rich>=13"
    python -m pip install "trl>=1.0" liger-kernel  # without them their rows are left out
    python benchmarks/gpu.py | tee gpu.txt

Should pip want to bring another torch, add `--constraint FILE` with a line `torch==` and the version that is there.

Last line, one JSON object: `device`, `torch`, `checks` (name, `max_abs`, `rel`, `tolerance`, `ok` each), `ok` (all of
them, and none missing), `rows` (`shape`, `block`, `tool`, `tokens_per_s`, `peak_mb`, `speed_over_trl` and
`memory_over_trl`: this row's over TRL's), `errors`, `left_out`, `seconds`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

LIMITS = {"checks": 100, "legolm": 80, "trl": 80, "trl+liger": 80}
"""Seconds for each part; together under six minutes."""
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
}
RANK, PACKED, WARM, TIMED, SECONDS = 8, 1024, 3, 8, 12
"""LoRA's rank, tokens of TRL's rows, steps before and under the clock, and how long these may take."""


def say(**line: Any) -> None:
    """A line for the process that started this one."""
    print(json.dumps(line), flush=True)


def brief(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# The parts, each in a process of its own.


def checks(device: str, small: bool) -> None:
    import torch

    from gpu_checks import CHECKS, World

    with tempfile.TemporaryDirectory(prefix="legolm-gpu-") as folder:
        world = World(Path(folder), torch.device(device), small)
        for check in CHECKS:
            began = time.perf_counter()
            try:
                found = check(world)
                for one in [found] if isinstance(found, dict) else found:
                    name = "_".join(filter(None, (check.__name__, one.pop("block", None))))
                    say(check={"name": name, **one}, seconds=round(time.perf_counter() - began, 1))
            except Exception as error:
                say(check={"name": check.__name__, "ok": False, "error": brief(error)})


def speed(tool: str, device: str, small: bool) -> None:
    import torch

    for shape, sizes in (SMALL if small else SHAPES).items():
        for block in ("dense", "half"):
            row = {"shape": shape, "block": block, "tool": tool}
            try:
                row |= (
                    _legolm(sizes, block, device, small)
                    if tool == "legolm"
                    else _trl(tool, sizes, block, device, small)
                )
                say(row=row)
            except Exception as error:
                say(row=row | {"error": brief(error)})
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _rows(vocabulary: int, small: bool) -> tuple[list[Any], int]:
    """(examples for all steps, how many make about eight rows of TRL's)."""
    import torch

    from legolm.data import Tokens

    draw = torch.Generator().manual_seed(0)
    batch = 4 if small else 32
    lengths = torch.randint(64, 449, (batch * (WARM + TIMED + 3),), generator=draw).tolist()
    return [Tokens(tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()), n // 2) for n in lengths], batch


class Steps:
    """When each step began, once the device had done all before it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seen: list[tuple[float, int]] = []

    def began(self, tokens: int, _answers: int) -> None:
        """A step with so many tokens begins."""
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
            if not self._seen:
                torch.cuda.reset_peak_memory_stats()
        self._seen.append((time.perf_counter(), tokens))

    def found(self) -> dict[str, Any]:
        """Speed of the steps after the warm-up (the last one's end is not seen) and peak memory of all."""
        import torch

        timed = self._seen[min(WARM, len(self._seen) - 2) :]
        speeds = [tokens / (after - at) for (at, tokens), (after, _) in pairwise(timed)]
        peak = round(torch.cuda.max_memory_allocated() / 1e6) if self._device == "cuda" else None
        return {
            "tokens_per_s": round(median(speeds), 1),
            "steps": len(speeds),
            "tokens_per_step": round(median(tokens for _, tokens in timed)),
            "peak_mb": peak,
        }


def _config(sizes: dict[str, Any], block: str) -> Any:
    from random_model import llama

    neurons = sizes["intermediate_size"]
    return llama(**sizes | {"intermediate_size": neurons if block == "dense" else neurons // 2})


def _legolm(sizes: dict[str, Any], block: str, device: str, small: bool) -> dict[str, Any]:
    import torch

    import train_peers
    from legolm.adapter import init_factors, slice_factors
    from legolm.block import Coverage
    from legolm.config import TrainConfig
    from legolm.finetune import Task
    from legolm.models import shape_of
    from random_model import as_loaded, random_model

    model = as_loaded(random_model(_config(sizes, block), device, torch.bfloat16), "bf16")
    full = Coverage.full(shape_of(_config(sizes, "dense")))
    kept = tuple(range(model.config.intermediate_size))
    coverage = Coverage(full.shape, full.layers, full.groups, (kept,) * len(full.layers))
    start = slice_factors(coverage, init_factors(full.shape, None, RANK, 0), RANK)
    rows, batch = _rows(sizes["vocab_size"], small)
    config = TrainConfig(batch_size=batch, micro_batch_tokens=1 << 16, learning_rate=1e-4, seconds=SECONDS)
    steps = Steps(device)
    train_peers.ours(Task(model, coverage, start, 2.0, rows, config, "bf16", WARM + TIMED + 1, 0), steps.began)
    return {"weights_kept": round(1 - coverage.sparsity, 3), **steps.found()}


def _trl(tool: str, sizes: dict[str, Any], block: str, device: str, small: bool) -> dict[str, Any]:
    import torch

    import train_peers
    from random_model import byte_tokenizer, random_model

    packing = "wrapped"
    model = random_model(_config(sizes, block), device, torch.bfloat16)
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
        packing = "bfd"
    rows, batch = _rows(sizes["vocab_size"], small)
    settings = {
        "packing": True,
        "packing_strategy": packing,
        "max_length": PACKED,
        "per_device_train_batch_size": batch // 4,
        "max_steps": WARM + TIMED + 1,
        "learning_rate": 1e-4,
        "logging_steps": 1000,
        "bf16": True,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "use_liger_kernel": tool == "trl+liger",
    }
    steps = Steps(device)
    train_peers.theirs("trl", model, byte_tokenizer(), rows, steps.began, RANK, settings, seconds=SECONDS)
    return {"packing": packing, **steps.found()}


# The process that starts them.


def lines(part: str, limit: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a part says, line by line; and why it ended, where it ended badly."""
    command = [sys.executable, __file__, "--part", part, "--device", options.device]
    command += ["--small"] if options.small else []
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(limit, process.kill)
    timer.start()
    last = ""
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith('{"'):  # a trainer's own log begins with {'
            yield json.loads(text)
        elif text.strip():
            last = text.strip()
    code = process.wait()
    late = timer.finished.is_set()
    timer.cancel()
    if late:
        yield {"failed": f"stopped after its {limit:.0f} s"}
    elif code:
        yield {"failed": f"ended with {code}: {last[:300]}"}


def compare_with_trl(rows: list[dict[str, Any]]) -> None:
    """Add each row's speed and memory over TRL's, where that is known."""
    trl = {(row["shape"], row["block"]): row for row in rows if row["tool"] == "trl"}
    for row in rows:
        peer = trl.get((row["shape"], row["block"]), {})
        for field, name in (("tokens_per_s", "speed_over_trl"), ("peak_mb", "memory_over_trl")):
            row[name] = round(row[field] / peer[field], 3) if row.get(field) and peer.get(field) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where it is, else cpu")
    parser.add_argument("--parts", nargs="*", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part and options.small:
        import torch

        torch.set_num_threads(1)  # toys are slower on more, the more so beside other work
    if options.part == "checks":
        return checks(options.device, options.small)
    if options.part:
        return speed(options.part, options.device, options.small)

    began = time.perf_counter()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.small = options.small or options.device == "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "small": options.small,
        "checks": [],
        "rows": [],
        "errors": {},
        "left_out": {},
    }
    for part in options.parts:
        wanted = {"trl": ["trl"], "trl+liger": ["trl", "liger_kernel"]}.get(part, [])
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        if missing or (part == "trl+liger" and options.device == "cpu"):
            result["left_out"][part] = f"{' and '.join(missing)} not installed" if missing else "needs a GPU"
            print(f"{time.perf_counter() - began:6.1f} s  {part} left out: {result['left_out'][part]}", flush=True)
            continue
        for line in lines(part, LIMITS[part], options):
            print(f"{time.perf_counter() - began:6.1f} s  {part}  {line}", flush=True)
            if "check" in line:
                result["checks"].append(line["check"])
            elif "row" in line:
                result["rows"].append(line["row"])
            else:
                result["errors"][part] = line["failed"]
    compare_with_trl(result["rows"])
    result["ok"] = bool(result["checks"]) and "checks" not in result["errors"]
    result["ok"] &= all(check["ok"] for check in result["checks"])
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
