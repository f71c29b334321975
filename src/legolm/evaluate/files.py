"""Evaluate a model in a folder or by name on files."""

from __future__ import annotations

from pathlib import Path

import torch

from legolm.config import Fields, Precision
from legolm.data import read_rows, read_text, render, to_example
from legolm.evaluate.answers import score
from legolm.evaluate.perplexity import perplexity
from legolm.models import load_config, load_model, load_tokenizer, resolve, shape_of

MAX_LENGTH = 2048
BATCH = 8


def evaluate_files(
    model: str,
    data: str | None,
    text: Path | None,
    fields: dict[str, str],
    length: int,
    windows: int | None,
    precision: Precision,
) -> dict[str, dict[str, float]]:
    """Figures by model: answer loss (nats a token) and exact match on `data`, perplexity on `text`."""
    path = resolve(model)
    shape_of(load_config(path))
    tokenizer, loaded = load_tokenizer(path), load_model(path)
    found: dict[str, float] = {}
    if data is not None:
        examples = [to_example(row, Fields(**fields)) for row in read_rows(data, "--data")]
        rendered = [render(example, tokenizer, MAX_LENGTH) for example in examples]
        scored = score(loaded, rendered, tokenizer.pad_token_id, BATCH, precision)
        found |= {"answer loss": scored.loss, "exact match": scored.exact_match}
    if text is not None:
        tokens = torch.tensor(tokenizer.encode(read_text(text, "--text"), add_special_tokens=False, verbose=False))
        found["perplexity"] = perplexity(loaded, tokens, length, precision, windows)
    return {model: found}
