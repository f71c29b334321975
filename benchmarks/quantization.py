"""What quantizing costs an LLM and its blocks, in llama.cpp: `python benchmarks/quantization.py MODEL...`.

Each model is written in f16, q8_0, q5_0 and q4_0 (embeddings q8_0 below 8 bits), with its channels balanced as `export`
does and as they are, and with the embeddings alone quantized. The perplexity of each file on the same tokens, over that
in f16, and its standard error by the differences of tokens: of prose (WikiText-2's where that is there, else Python's
own help), or with `--run` of the answers to a run's test questions. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from legolm.data import client_data, encode, help_tokens, render_whole
from legolm.export.gguf import described
from legolm.export.gguf_balance import Balance, balance_of
from legolm.export.gguf_write import Quant, write_gguf
from legolm.export.llama_cpp import llama_cpp
from legolm.export.source import Source, open_source
from legolm.runs import RunDir
from legolm.system import machine

KINDS: list[tuple[Quant, Quant | None, bool]] = [
    ("f16", None, False),
    ("q8_0", None, True),
    ("q8_0", None, False),
    ("q5_0", None, True),
    ("q5_0", None, False),
    ("q4_0", None, True),
    ("q4_0", None, False),
    ("f16", "q8_0", False),
    ("f16", "q4_0", False),
]
"""Of the decoder's matrices, of the embeddings where they are another than they would be, and whether balanced."""
READ = 32

Asked = list[tuple[list[int], int]]
"""Texts as tokens, and how many of each are only read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["starter"])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/wikitext2/test.txt"))
    parser.add_argument("--run", type=Path, help="folder of a run, whose test questions are asked")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--scratch", type=Path, default=Path("runs/quantization"))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.models:
        with open_source(name, None, given.scratch / "file") as source:
            asked = answers(source, given.run, given.tokens) if given.run else prose(source, given.text, given.tokens)
            balance = balance_of(source.load(), source.tokenizer, described(source)[0])
            exact, size = None, 0
            for quant, embeddings, balanced in KINDS:
                losses, bytes_ = measured(source, quant, embeddings, balance if balanced else Balance(), asked)
                exact, size = (losses, bytes_) if exact is None else (exact, size)
                more = losses - exact
                rows.append(
                    {
                        "model": name,
                        "quant": quant if embeddings is None else f"{quant}, embeddings {embeddings}",
                        "balanced": balanced,
                        "tokens": len(losses),
                        "perplexity": math.exp(losses.mean()),
                        "ratio": math.exp(more.mean()),
                        "ratio_se": float(math.exp(more.mean()) * more.std() / len(more) ** 0.5),
                        "spread": float(more.std()),
                        "bytes": bytes_,
                        "bytes_ratio": bytes_ / size,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"machine": machine(), "rows": rows}))


def measured(
    source: Source, quant: Quant, embeddings: Quant | None, balance: Balance, asked: Asked
) -> tuple[torch.Tensor, int]:
    """Loss (nats) of each of the tokens, (tokens,), and the file's bytes."""
    layout, vocabulary = described(source)
    file = source.scratch / "model.gguf"
    write_gguf(source.path, file, layout, vocabulary, quant, source.block.name, balance, embeddings)
    with llama_cpp(file, max(len(ids) for ids, _ in asked) + 8) as runtime:
        losses = [
            -runtime.next(ids[:place], ids[place], 1).asked for ids, read in asked for place in range(read, len(ids))
        ]
    size = file.stat().st_size
    file.unlink()
    return torch.tensor(losses, dtype=torch.float64), size


def prose(source: Source, text: Path, count: int) -> Asked:
    if not text.is_file():
        return [(help_tokens(source.tokenizer, READ + count), READ)]
    return [(encode(text.read_text(encoding="utf-8")[: (READ + count) * 12], source.tokenizer)[: READ + count], READ)]


def answers(source: Source, run: Path, count: int) -> Asked:
    """Test questions of the run, from all over its clients, until their answers have as many tokens."""
    parts = client_data(RunDir(run).known())
    examples = [example for part in parts.values() for example in part.test]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    found: Asked = []
    for one in render_whole([examples[at] for at in order], source.tokenizer, described(source)[0].context, "run"):
        if sum(len(ids) - read for ids, read in found) >= count:
            break
        found.append((list(one.ids), one.answer))
    return found


if __name__ == "__main__":
    main()
