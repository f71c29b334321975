"""Perplexity of running text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from legolm.config import Precision
from legolm.data import windows
from legolm.errors import LegolmError
from legolm.evaluation.figure import Array
from legolm.models import autocast


def text_windows(tokens: Tensor, length: int, most: int | None = None, first: Sequence[int] = ()) -> Tensor:
    """The first `most` windows (windows, length) of a text's ids (n,), side by side; the rest of it is left out.

    Each begins with `first`, as the tokenizer begins a text (`data.begin`). Raises `LegolmError` when the text is
    shorter than one.
    """
    found = windows(tokens.numpy(), length, first, most)
    if not len(found):
        raise LegolmError(f"text: {len(tokens)} tokens; a window needs {length}; give more text or a smaller --length")
    return found


def window_losses(model: Any, texts: Tensor, precision: Precision) -> Array:
    """Loss (nats) summed over the predictions of each window of ids (windows, length), all but its first: float64."""
    losses = []
    with torch.no_grad(), autocast(precision, model.device.type):
        for window in texts.to(model.device):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(float(cross_entropy(logits, window[1:], reduction="sum")))
    return np.array(losses)


def perplexity(
    model: Any, tokens: Tensor, length: int, precision: Precision, most: int | None = None, first: Sequence[int] = ()
) -> float:
    """exp of the mean loss over the windows of `text_windows`."""
    return math.exp(window_losses(model, text_windows(tokens, length, most, first), precision).mean() / (length - 1))
