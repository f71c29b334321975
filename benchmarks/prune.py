"""Blocks side by side: perplexity, size, cost of the cut, speed against the dense model.

    python benchmarks/prune.py --text TEST.txt --calibration VALID.txt [--model starter] [--samples 32] [--length 512]

Each block is cut in a process of its own (one thread), so that its CPU seconds and peak memory are its own. Perplexity
is over the first ten windows of 1,024 test tokens. `prefill_ratio` and `decode_ratio` are the block's speed over the
dense model's on 512 prompt tokens and 32 generated ones, medians of pairs that take turns. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

BLOCKS: list[dict[str, Any]] = [
    {"method": "wanda", "sparsity": 0.25},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "wanda", "sparsity": 0.5},
    {"method": "sparsegpt", "sparsity": 0.5},
    {"method": "sparsegpt", "sparsity": 0.75},
    {"method": "structured", "sparsity": 0.25},
    {"method": "structured", "sparsity": 0.5},
    {"method": "structured", "num_key_value_heads": 2, "intermediate_size": 683},
    {"method": "structured", "num_hidden_layers": 22},
]
WINDOWS, WINDOW, PROMPT, NEW, PAIRS = 10, 1024, 512, 32, 5


def cut(options: argparse.Namespace, target: dict[str, Any], out: Path) -> dict[str, Any]:
    """In this process: cut one block, then measure it."""
    import torch

    from legolm.config import BlockConfig, CalibrationConfig
    from legolm.models import fingerprint, load_model, resolve
    from legolm.progress import Progress
    from legolm.prune import cut_blocks

    torch.set_num_threads(1)
    base = resolve(options.model)
    calibration = CalibrationConfig(text=str(options.calibration), samples=options.samples, length=options.length)
    spec = BlockConfig(name="block", calibration=calibration, **target)
    began = time.process_time()
    (block,) = cut_blocks(base, fingerprint(base), [(spec, out)], 0, "bf16", Progress())
    cpu_s = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"method": block.method, "pattern": "structured" if block.method == "structured" else "unstructured"}
    model, dense = load_model(block.path, torch.bfloat16), load_model(base, torch.bfloat16)
    return found | {
        "sparsity": round(block.sparsity, 4),
        "ppl": round(wikitext(model, options), 2),
        "params": block.parameters,
        "file_bytes": block.file_bytes,
        "cpu_s": round(cpu_s, 1),
        "peak_rss_mb": round(peak / 1e6),
        **speed(model, dense),
    }


def wikitext(model: Any, options: argparse.Namespace) -> float:
    import torch

    from legolm.data import read_text
    from legolm.evaluate import perplexity
    from legolm.models import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(options.model))
    ids = tokenizer.encode(read_text(options.text, "--text"), add_special_tokens=False, verbose=False)
    return perplexity(model, torch.tensor(ids), WINDOW, "bf16", WINDOWS)


def speed(model: Any, dense: Any) -> dict[str, float]:
    """Ratios of speed, block over dense, one pair after the other."""
    import torch

    ids = torch.arange(100, 100 + PROMPT)[None]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def clock(one: Any, generate: bool) -> float:
        began = time.process_time()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            one.generate(ids[:, :8], **settings) if generate else one(ids, logits_to_keep=1)
        return time.process_time() - began

    ratios = {}
    for name, generate in (("prefill_ratio", False), ("decode_ratio", True)):
        pairs = [(clock(dense, generate), clock(model, generate)) for _ in range(PAIRS + 1)][1:]
        ratios[name] = round(median(slow / fast for slow, fast in pairs), 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--text", type=Path, required=True, help="test text")
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="legolm-prune-") as folder:
        if options.target:
            print(json.dumps(cut(options, json.loads(options.target), Path(folder) / "block")))
            return
    from legolm.models import load_model, resolve

    dense = round(wikitext(load_model(resolve(options.model)), options), 2)
    print(f"dense perplexity {dense}", flush=True)
    blocks = []
    for target in BLOCKS:
        command = [sys.executable, *sys.argv, "--target", json.dumps(target)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        blocks.append(json.loads(output.splitlines()[-1]))
        print(blocks[-1], flush=True)
    print(json.dumps({"dense_ppl": dense, "blocks": blocks}))


if __name__ == "__main__":
    main()
