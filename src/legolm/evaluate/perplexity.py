"""Perplexity of running text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from legolm.config import Precision
from legolm.evaluate.figure import Array
from legolm.finetune import autocast
from legolm.types import LegolmError


def window_losses(model: Any, tokens: Tensor, length: int, precision: Precision, windows: int | None = None) -> Array:
    """Loss (nats) summed over the `length` - 1 predictions of each window: (windows,) float64.

    The windows do not overlap; `tokens` is int64, one dimension. Raises `LegolmError` when it is shorter than one.
    """
    found = tokens[: len(tokens) // length * length].view(-1, length)[:windows]
    if not len(found):
        raise LegolmError(f"text: {len(tokens)} tokens; a window needs {length}; give more text or a smaller --length")
    losses = []
    with torch.no_grad(), autocast(precision, model.device.type):
        for window in found.to(model.device):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(float(cross_entropy(logits, window[1:], reduction="sum").double()))
    return np.array(losses)


def perplexity(model: Any, tokens: Tensor, length: int, precision: Precision, windows: int | None = None) -> float:
    """exp of the mean loss over the windows of `window_losses`."""
    return math.exp(window_losses(model, tokens, length, precision, windows).mean() / (length - 1))
