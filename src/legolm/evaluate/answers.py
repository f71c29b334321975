"""How well a model answers: loss per answer token and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from legolm.config import Precision
from legolm.data import Tokens, batches
from legolm.finetune import answer_logits, autocast
from legolm.types import Score


def score(model: Any, examples: Sequence[Tokens], pad_id: int, batch_size: int, precision: Precision) -> Score:
    """Mean loss (nats) over all answer tokens, and the share of answers that greedy decoding gives exactly.

    Greedy decoding gives the answer and its end exactly when each of their tokens is the likeliest after the true
    ones before it, so one forward pass decides it and nothing is generated.
    """
    loss, tokens, exact = 0.0, 0, 0
    with torch.no_grad(), autocast(precision, model.device.type):
        for inputs in batches(examples, batch_size, pad_id):
            logits = answer_logits(model, inputs).float()
            labels = inputs.labels.to(logits.device)
            counted = labels != -100
            loss += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").double())
            tokens += int(counted.sum())
            exact += int(((logits.argmax(-1) == labels) | ~counted).all(1).sum())
    return Score(loss / tokens, exact / len(examples), tokens, len(examples))


def mean_loss(scores: Sequence[Score]) -> float:
    """Mean of the losses, each set counting the same."""
    return sum(found.loss for found in scores) / len(scores)
