"""How fast, large and exact an LLM and its blocks are where people run them: `python benchmarks/inference.py`.

Cuts three structured blocks (a quarter, a half, three quarters removed) and one with a bit mask of the LLM (once, below
`--out`), and has all five answer in turns in each runtime: transformers, llama.cpp in q8_0 and f16, onnxruntime. The
last line is one JSON object. `decode_over_ideal`: the half block's tokens a second over the LLM's in llama.cpp q8_0,
over the ratio of their bytes; `prefill_over_ideal`: the same of reading, over the ratio of the decoder's weights;
`q8_0_perplexity_ratio`: the largest of the five, of the file over its checkpoint. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import legolm as lg
from legolm.export import Speed, bench
from legolm.export.gguf import ASKED, described, spans, verify
from legolm.export.gguf_write import write_gguf
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
    speeds: list[Speed] = []
    for runtime, quant in RUNTIMES:
        found = bench(models, [runtime], quant, given.prompt, given.tokens, given.turns, given.out / "bench")
        speeds += found
        for one in found:
            print(json.dumps(asdict(one)), flush=True)
    whole, half = (speed_of(speeds, name) for name in (given.model, str(blocks["half"].path)))
    weights = 1 / (1 - blocks["half"].sparsity)
    print(
        json.dumps(
            {
                "machine": machine(),
                "figures": [asdict(one) for one in speeds],
                "decode_over_ideal": half.decode / whole.decode / (whole.bytes / half.bytes),
                "prefill_over_ideal": half.prefill / whole.prefill / weights,
                "q8_0_perplexity_ratio": max(perplexity_ratio(name, given.out / "bench") for name in models),
            }
        )
    )


def speed_of(speeds: list[Speed], model: str) -> Speed:
    """In llama.cpp q8_0."""
    return next(one for one in speeds if one.model == model and one.runtime == "llama.cpp q8_0")


def perplexity_ratio(name: str, beside: Path) -> float:
    """Of the q8_0 file over the checkpoint, on the same tokens."""
    with open_source(name, None, beside) as source:
        layout, vocabulary = described(source)
        reference = Reference.of(source.load(), source.tokenizer, *spans(layout, ASKED))
        file = source.scratch / "q8_0.gguf"
        write_gguf(source.path, file, layout, vocabulary, "q8_0", name)
        return verify(source, file, reference, "q8_0").ratio


if __name__ == "__main__":
    main()
