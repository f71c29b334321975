"""Models whose answers a person can tell: each token has the same logit everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from legolm.models import load_model

Unigram = Callable[..., Any]
TASK = {
    "task": "three",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/three.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
QUESTIONS = [
    {"query": "one", "choices": ["aaaa", "b"], "gold": 0},
    {"query": "two", "choices": ["aaaa", "b"], "gold": 1},
    {"query": "three", "choices": ["aaaa", "b"], "gold": 1},
]


@pytest.fixture(scope="session")
def unigram(tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast) -> Unigram:
    """A model that gives a token the same logit wherever it stands: 0, or what `logits` says of a token."""

    def make(**logits: float) -> Any:
        model = load_model(tiny("gpt_neox"))
        norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
        norm.weight.data.zero_()
        norm.bias.data.zero_()
        norm.bias.data[0] = 1
        head.weight.data.zero_()
        for token, logit in logits.items():
            head.weight.data[tokenizer.convert_tokens_to_ids(token), 0] = logit
        assert torch.equal(head.weight.data[:, 1:], torch.zeros_like(head.weight.data[:, 1:]))
        return model

    return make


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder with the task `three`, its YAML with `changes` (None leaves a field out) and its data beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows: list[dict[str, Any]] = QUESTIONS, **changes: Any) -> Path:
        folder = tmp_path / "tasks"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = {key: value for key, value in (TASK | changes).items() if value is not None}
        (folder / "three.yaml").write_text(json.dumps(fields))  # JSON is YAML
        return folder

    return write
