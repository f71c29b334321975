"""Perplexity of running text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from legolm.config import Precision
from legolm.finetune import autocast
from legolm.types import LegolmError


def perplexity(model: Any, tokens: Tensor, length: int, precision: Precision, windows: int | None = None) -> float:
    """exp of the mean loss over non-overlapping windows of `length` tokens (int64, one dimension).

    Raises `LegolmError` when the text is shorter than one window.
    """
    found = tokens[: len(tokens) // length * length].view(-1, length)[:windows]
    if not len(found):
        raise LegolmError(f"text: {len(tokens)} tokens; a window needs {length}; give more text or a smaller --length")
    total = 0.0
    with torch.no_grad(), autocast(precision, model.device.type):
        for window in found.to(model.device):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += float(cross_entropy(logits, window[1:], reduction="sum").double())
    return math.exp(total / (len(found) * (length - 1)))
