"""How fast, large and exact an LLM and its blocks are where people run them: `python benchmarks/inference.py`.

Cuts three structured blocks (a quarter, a half, three quarters removed) and one with a bit mask of the LLM (once, below
`--out`), and has all five answer in turns in each runtime: transformers, llama.cpp in q8_0 and f16, onnxruntime. The
last line is one JSON object. `decode_over_ideal`: the half block's tokens a second over the LLM's in llama.cpp q8_0,
over the ratio of their bytes; `prefill_over_ideal`: the same of reading, over the ratio of the decoder's weights; both
medians of pairs on one thread, in the seconds of CPU that llama.cpp's process took, which other work on the machine
hardly changes. `q8_0_perplexity_ratio`: the largest of the five, of the file over its checkpoint. All other figures are
of the clock: for those run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import psutil

import legolm as lg
from legolm.export import Speed, bench, export
from legolm.export.gguf import ASKED, described, spans, verify
from legolm.export.gguf_write import write_gguf
from legolm.export.llama_cpp import LlamaCpp, llama_cpp
from legolm.export.probe import Reference
from legolm.export.source import open_source
from legolm.export.speed import Runtime
from legolm.system import machine

RUNTIMES: list[tuple[Runtime, str]] = [
    ("transformers", "q8_0"),
    ("llama.cpp", "q8_0"),
    ("llama.cpp", "f16"),
    ("onnxruntime", "q8_0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--runtimes", nargs="*", default=[name for name, _ in RUNTIMES], help="which are measured")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    given = parser.parse_args()
    llm = lg.LLM(given.model)
    blocks = {
        name: lg.cut(llm, given.out / name, method=method, sparsity=sparsity, samples=given.samples)
        for name, method, sparsity in (
            ("quarter", "structured", 0.25),
            ("half", "structured", 0.5),
            ("three-quarters", "structured", 0.75),
            ("mask", "wanda", 0.5),
        )
    }
    models = [given.model, *(str(block.path) for block in blocks.values())]
    result = {"machine": machine(), **ratios(given.model, blocks["half"], given)}
    print(json.dumps(result), flush=True)
    result["q8_0_perplexity_ratio"] = max(perplexity_ratio(name, given.out / "bench") for name in models)
    print(json.dumps(result), flush=True)
    speeds: list[Speed] = []
    for runtime, quant in RUNTIMES:
        if runtime in given.runtimes:
            speeds += bench(models, [runtime], quant, given.prompt, given.tokens, given.turns, given.out / "bench")
            print(*(json.dumps(asdict(one)) for one in speeds[-len(models) :]), sep="\n", flush=True)
    print(json.dumps(result | {"figures": [asdict(one) for one in speeds]}))


def ratios(llm: str, half: lg.Block, given: argparse.Namespace) -> dict[str, object]:
    """How much faster the half block is in llama.cpp q8_0 than the LLM, over what its bytes or weights allow."""
    files = [given.out / "llm.gguf", given.out / "half.gguf"]
    for name, file in zip((llm, str(half.path)), files, strict=True):
        if not file.exists():
            export(name, "gguf", file)
    size = given.prompt + given.tokens + 8
    with llama_cpp(files[0], size, threads=1) as first, llama_cpp(files[1], size, threads=1) as second:
        taken = [(seconds(first, given), seconds(second, given)) for _ in range(given.pairs + 1)][1:]  # one warms up
    faster = [statistics.median(whole[part] / small[part] for whole, small in taken) for part in (0, 1)]
    whole_bytes, half_bytes = (file.stat().st_size for file in files)
    return {
        "prefill_faster": faster[0],
        "decode_faster": faster[1],
        "fewer_weights": 1 / (1 - half.sparsity),
        "fewer_bytes": whole_bytes / half_bytes,
        "prefill_over_ideal": faster[0] * (1 - half.sparsity),
        "decode_over_ideal": faster[1] * half_bytes / whole_bytes,
        "cpu_s": [[statistics.median(one[side][part] for one in taken) for part in (0, 1)] for side in (0, 1)],
    }


def seconds(server: LlamaCpp, given: argparse.Namespace) -> tuple[float, float]:
    """CPU time of reading the prompt, and of generating behind it."""
    prompt, process = [index % 200 for index in range(given.prompt)], psutil.Process(server.process.pid)
    taken = []
    for tokens in (0, given.tokens):  # the second finds the prompt read
        before = process.cpu_times()
        server.post(
            "/completion",
            {"prompt": prompt, "n_predict": tokens, "cache_prompt": tokens > 0, "ignore_eos": True, "temperature": 0},
        )
        after = process.cpu_times()
        taken.append(after.user + after.system - before.user - before.system)
    return taken[0], taken[1]


def perplexity_ratio(name: str, beside: Path) -> float:
    """Of the q8_0 file over the checkpoint, on the same tokens."""
    with open_source(name, None, beside) as source:
        layout, vocabulary = described(source)
        reference = Reference.of(source.load(), source.tokenizer, *spans(layout, ASKED))
        file = source.scratch / "q8_0.gguf"
        write_gguf(source.path, file, layout, vocabulary, "q8_0", name)
        return verify(source, file, reference, "q8_0", vocabulary).ratio


if __name__ == "__main__":
    main()
