"""What quantizing costs an LLM and its blocks, in llama.cpp: `python benchmarks/quantization.py MODEL...`.

Each model is written in f16, q8_0, q5_0 and q4_0 (embeddings q8_0 below 8 bits), and with the embeddings alone
quantized. The perplexity of each file on the same tokens of prose, over that in f16, and its standard error by the
differences of tokens. The text is WikiText-2's where that is there, else Python's own help. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from legolm.data import encode, help_tokens
from legolm.export.gguf import described
from legolm.export.gguf_write import Quant, write_gguf
from legolm.export.llama_cpp import llama_cpp
from legolm.export.source import Source, open_source
from legolm.system import machine

KINDS: list[tuple[Quant, Quant | None]] = [
    ("f16", None),
    ("q8_0", None),
    ("q5_0", None),
    ("q4_0", None),
    ("f16", "q8_0"),
    ("f16", "q4_0"),
]
"""Of the decoder's matrices, and of the embeddings where they are another than they would be."""
READ = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["starter"])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/wikitext2/test.txt"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--scratch", type=Path, default=Path("runs/quantization"))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.models:
        with open_source(name, None, given.scratch / "file") as source:
            exact, size = None, 0
            for quant, embeddings in KINDS:
                losses, bytes_ = measured(source, quant, embeddings, given.text, given.tokens)
                exact, size = (losses, bytes_) if exact is None else (exact, size)
                more = losses - exact
                rows.append(
                    {
                        "model": Path(name).name,
                        "quant": quant if embeddings is None else f"{quant}, embeddings {embeddings}",
                        "perplexity": math.exp(losses.mean()),
                        "ratio": math.exp(more.mean()),
                        "ratio_se": float(math.exp(more.mean()) * more.std() / len(more) ** 0.5),
                        "bytes": bytes_,
                        "bytes_ratio": bytes_ / size,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"machine": machine(), "tokens": given.tokens, "rows": rows}))


def measured(
    source: Source, quant: Quant, embeddings: Quant | None, text: Path, tokens: int
) -> tuple[torch.Tensor, int]:
    """Loss (nats) of each of the tokens, (tokens,), and the file's bytes."""
    layout, vocabulary = described(source)
    file = source.scratch / "model.gguf"
    write_gguf(source.path, file, layout, vocabulary, quant, source.block.name, embeddings)
    ids = prose(source, text, READ + tokens)
    with llama_cpp(file, len(ids) + 8) as runtime:
        losses = [-runtime.next(ids[:place], ids[place], 1).asked for place in range(READ, len(ids))]
    size = file.stat().st_size
    file.unlink()
    return torch.tensor(losses, dtype=torch.float64), size


def prose(source: Source, text: Path, count: int) -> list[int]:
    if not text.is_file():
        return help_tokens(source.tokenizer, count)
    return encode(text.read_text(encoding="utf-8")[: count * 12], source.tokenizer)[:count]


if __name__ == "__main__":
    main()
