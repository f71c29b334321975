"""How fast, large and exact an LLM and its blocks are where people run them: `python benchmarks/inference.py`.

Cuts three structured blocks (a quarter, a half, three quarters removed) and one with a bit mask of the LLM (once, below
`--out`), and has all five answer in turns in each runtime: transformers, llama.cpp in q8_0 and f16, onnxruntime. The
last line is one JSON object. `one_thread`, of each in llama.cpp q8_0 on one thread: tokens a second of the CPU time
that llama.cpp's process took, which other work on the machine hardly changes; medians of turns. `decode_over_ideal`:
the half block's over the LLM's, over the ratio of their bytes; `prefill_over_ideal`: the same of reading, over the
ratio of the decoder's weights; medians of pairs. `q8_0_perplexity_ratio`: the largest of the five, of the file over its
checkpoint; beside it each with its standard error. `figures` are of the clock: for those run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

import legolm as lg
from legolm.export import Speed, bench
from legolm.export.gguf import described, spans, verify
from legolm.export.gguf_balance import balance_of
from legolm.export.gguf_write import write_gguf
from legolm.export.llama_cpp import LlamaCpp, llama_cpp
from legolm.export.probe import Measured, Reference
from legolm.export.source import open_source
from legolm.export.speed import Runtime, peak
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
    parser.add_argument("--asked", type=int, default=1024, help="tokens of the perplexities: 96 leave an error of 2 %%")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--runtimes", nargs="*", default=[name for name, _ in RUNTIMES], help="which are measured")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--recover", type=int, default=0, help="steps of distillation of the structured blocks")
    given = parser.parse_args()
    llm = lg.LLM(given.model)
    blocks = {
        name: lg.cut(llm, given.out / name, method=method, sparsity=sparsity, samples=given.samples, recover=steps)
        for name, method, sparsity, steps in (
            ("quarter", "structured", 0.25, given.recover),
            ("half", "structured", 0.5, given.recover),
            ("three-quarters", "structured", 0.75, given.recover),
            ("mask", "wanda", 0.5, 0),
        )
    }
    models = [given.model, *(str(block.path) for block in blocks.values())]
    files = [given.out / f"{place}.gguf" for place in range(len(models))]
    lost = [write(name, file, given.asked) for name, file in zip(models, files, strict=True)]
    result = {
        "machine": machine(),
        "q8_0_perplexity_ratio": max(one.ratio for one in lost),
        "q8_0_perplexity_ratios": [(one.ratio, one.stderr) for one in lost],
    }
    print(json.dumps(result), flush=True)
    result |= in_cpu_time(models, files, blocks["half"], given)
    print(json.dumps(result), flush=True)
    speeds: list[Speed] = []
    for runtime, quant in RUNTIMES:
        if runtime in given.runtimes:
            speeds += bench(models, [runtime], quant, given.prompt, given.tokens, given.turns)
            print(*(json.dumps(asdict(one)) for one in speeds[-len(models) :]), sep="\n", flush=True)
    print(json.dumps(result | {"figures": [asdict(one) for one in speeds]}))


def write(name: str, file: Path, asked: int) -> Measured:
    """The model in q8_0, and how llama.cpp's distributions differ from the checkpoint's, on the same tokens."""
    with open_source(name, None, file) as source:
        layout, vocabulary = described(source)
        model = source.load()
        reference = Reference.of(model, source.tokenizer, *spans(layout, asked))
        balance = balance_of(model, source.tokenizer, layout)
        write_gguf(source.path, file, layout, vocabulary, "q8_0", name, balance)
        return verify(source, file, reference, "q8_0", vocabulary)


def in_cpu_time(models: list[str], files: list[Path], half: lg.Block, given: argparse.Namespace) -> dict[str, Any]:
    """Of each model in llama.cpp q8_0 on one thread; how much faster the half block is than its size allows."""
    with ExitStack() as stack:
        context = given.prompt + given.tokens + 8
        servers = [stack.enter_context(llama_cpp(file, context, threads=1)) for file in files]
        taken = [[seconds(one, given) for one in servers] for _ in range(given.pairs + 1)][1:]  # one warms up
        memory = [peak(one.process.pid) for one in servers]
    sizes = [file.stat().st_size for file in files]
    place = models.index(str(half.path))
    faster = [statistics.median(turn[0][part] / turn[place][part] for turn in taken) for part in (0, 1)]
    middle = [[statistics.median(turn[at][part] for turn in taken) for part in (0, 1)] for at in range(len(models))]
    return {
        "prefill_over_ideal": faster[0] * (1 - half.sparsity),
        "decode_over_ideal": faster[1] * sizes[place] / sizes[0],
        "one_thread": [
            {
                "model": name,
                "prefill": given.prompt / read,
                "decode": given.tokens / rest,
                "memory": used,
                "bytes": size,
            }
            for name, (read, rest), used, size in zip(models, middle, memory, sizes, strict=True)
        ],
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


if __name__ == "__main__":
    main()
