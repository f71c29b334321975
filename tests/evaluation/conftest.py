"""Models whose answers a person can tell: each token has the same logit everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from legolm.models import load_model

Unigram = Callable[..., Any]


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
