"""Blocks side by side: perplexity, size, cost of the cut, speed against the dense model, and a peer.

    python benchmarks/prune.py --text TEST.txt --calibration VALID.txt [--model starter] [--samples 32] [--length 512]
                               [--peer-python PYTHON] [--only METHOD ...]

Each block is cut in a process of its own (one thread), so that its CPU seconds and peak memory are its own. Perplexity
is over the first ten windows of 1,024 test tokens, matrix products in bfloat16. `prefill_ratio` and `decode_ratio` are
the block's speed over the dense model's on 512 prompt tokens and on 32 generated ones (both models in bfloat16, medians
of pairs that take turns); `decode_of_bytes` is the latter over the ratio of their bytes. With `--peer-python`, the
Python of an environment with llm-compressor, that prunes with the same tokens in turn with ours. `forward_s` is the CPU
time of the calibration's forward pass alone. Last line: one JSON object.
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
    {"method": "sparsegpt", "sparsity": 0.5, "refit": 0},
    {"method": "magnitude", "pattern": "2:4"},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "sparsegpt", "sparsity": 0.75},
    {"method": "structured", "sparsity": 0.25},
    {"method": "structured", "sparsity": 0.5},
    {"method": "structured", "sparsity": 0.75},
    {"method": "structured", "intermediate_size": 512},
    {"method": "structured", "num_key_value_heads": 2, "intermediate_size": 680},
    {"method": "structured", "num_hidden_layers": 22},
    {"method": "structured", "speedup": 1.5},
]
PEERS = [
    target
    for target in BLOCKS
    if target["method"] in ("wanda", "sparsegpt") and target.get("sparsity") == 0.5 and "refit" not in target
]
WINDOWS, WINDOW, PROMPT, NEW, PAIRS = 10, 1024, 512, 32, 5


def cut(options: argparse.Namespace, target: dict[str, Any], out: Path) -> dict[str, Any]:
    """In this process: cut one block, then measure it."""
    import torch

    from legolm.config import BlockConfig
    from legolm.models import fingerprint, folder_bytes, load_model, resolve
    from legolm.prune import cut_blocks
    from legolm.system import Progress

    torch.set_num_threads(1)
    base = resolve(options.model)
    spec = BlockConfig(name="block", calibration=calibration(options), **target)
    began = time.process_time()
    (block,) = cut_blocks(base, fingerprint(base), [(spec, out)], 0, "bf16", Progress())
    cpu_s = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shape = block.coverage.block_shape
    whole = "unstructured" if block.method != "structured" else "structured"
    found = {"method": block.method, "pattern": target.get("pattern", whole)}
    found |= {name: value for name, value in target.items() if name == "refit"}
    if block.method == "structured":
        found |= {"layers": shape.layers, "kv_groups": shape.kv_groups, "neurons": shape.neurons}
    speeds = speed(block.path, base)
    return found | {
        "sparsity": round(block.sparsity, 4),
        "ppl": round(wikitext(load_model(block.path, torch.bfloat16), options), 2),
        "params": block.parameters,
        "file_bytes": block.file_bytes,
        "cpu_s": round(cpu_s, 1),
        "peak_rss_mb": round(peak / 1e6),
        **speeds,
        "decode_of_bytes": round(speeds["decode_ratio"] * block.file_bytes / folder_bytes(base), 2),
    }


def calibration(options: argparse.Namespace) -> Any:
    from legolm.config import CalibrationConfig

    return CalibrationConfig(text=str(options.calibration), samples=options.samples, length=options.length)


def peer(options: argparse.Namespace, target: dict[str, Any], folder: Path) -> dict[str, Any]:
    """llm-compressor on the same tokens, measured by the same perplexity."""
    import torch
    from safetensors.torch import save_file

    from legolm.data import calibration_tokens
    from legolm.models import load_model, load_tokenizer, resolve

    base = resolve(options.model)
    tokens = calibration_tokens(calibration(options), load_tokenizer(base), 0)
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    command = [options.peer_python, str(Path(__file__).parent / "prune_peer.py"), str(base)]
    command += [str(folder / "tokens.safetensors"), target["method"], str(target["sparsity"]), "unstructured"]
    done = subprocess.run([*command, str(folder / "peer")], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ppl = round(wikitext(load_model(folder / "peer", torch.bfloat16), options), 2)
    return {"tool": "llm-compressor", **target, "ppl": ppl} | found


def forward_s(options: argparse.Namespace) -> float:
    """CPU seconds of a forward pass of every layer over the calibration tokens."""
    import torch

    from legolm.data import calibration_tokens
    from legolm.models import LayeredModel, load_tokenizer, resolve
    from legolm.prune.calibrate import Stream
    from legolm.system import keep_freed_memory

    torch.set_num_threads(1)
    base = resolve(options.model)
    model = LayeredModel(base)
    began = time.process_time()
    stream = Stream.start(model, calibration_tokens(calibration(options), load_tokenizer(base), 0), "bf16")
    with keep_freed_memory():
        for index in range(len(model.layers)):
            with model.layer(index) as layer:
                stream.advance(index, layer)
    return round(time.process_time() - began, 1)


def wikitext(model: Any, options: argparse.Namespace) -> float:
    import torch

    from legolm.data import read_text
    from legolm.evaluation import perplexity
    from legolm.models import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(options.model))
    ids = tokenizer.encode(read_text(options.text, "--text"), add_special_tokens=False, verbose=False)
    return perplexity(model, torch.tensor(ids), WINDOW, "bf16", WINDOWS)


def speed(block: Path, base: Path) -> dict[str, float]:
    """Ratios of speed, block over dense, one pair after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    model, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (block, base))
    ids = torch.arange(100, 100 + PROMPT)[None]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def clock(one: Any, generate: bool) -> float:
        began = time.process_time()
        with torch.no_grad():
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
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor")
    parser.add_argument("--only", nargs="+", help="only these methods, or methods with their target: wanda-0.5")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=("block", "peer", "forward", "dense"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        with tempfile.TemporaryDirectory(prefix="legolm-prune-") as folder:
            print(json.dumps(one_job(options, Path(folder))))
        return

    def job(name: str, target: dict[str, Any] | None = None) -> Any:
        command = [sys.executable, *sys.argv, "--job", name, "--target", json.dumps(target)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(name, found, flush=True)
        return found

    dense, forward = job("dense"), job("forward")
    blocks, peers = [], []
    for target in BLOCKS:
        names = {target["method"], "-".join(map(str, target.values()))}
        if options.only and not names & set(options.only):
            continue
        blocks.append(job("block", target))
        if options.peer_python and target in PEERS:
            peers.append(job("peer", target))
    print(json.dumps({"dense_ppl": dense, "forward_s": forward, "blocks": blocks, "peers": peers}))


def one_job(options: argparse.Namespace, folder: Path) -> Any:
    """What a process of its own does."""
    from legolm.models import load_model, resolve

    target = json.loads(options.target)
    if options.job == "block":
        return cut(options, target, folder / "block")
    if options.job == "peer":
        return peer(options, target, folder)
    return (
        forward_s(options)
        if options.job == "forward"
        else round(wikitext(load_model(resolve(options.model)), options), 2)
    )


if __name__ == "__main__":
    main()
