"""How well a model answers: loss per answer token and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from legolm.config import Precision
from legolm.data import Tokens, batches
from legolm.evaluate.figure import Array
from legolm.finetune import answer_logits, autocast
from legolm.types import Score


@dataclass(frozen=True)
class Answers:
    """Example by example, each (n,) float64: loss summed over the answer (nats), its tokens, 1 if exact else 0."""

    losses: Array
    tokens: Array
    exact: Array


def score_each(model: Any, examples: Sequence[Tokens], pad_id: int, batch_size: int, precision: Precision) -> Answers:
    """Loss and exactness of each answer, in the order of `examples`.

    Greedy decoding gives the answer and its end exactly when each of their tokens is the likeliest after the true
    ones before it, so one forward pass decides it and nothing is generated.
    """
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids), reverse=True)
    losses, tokens, exact = (np.zeros(len(examples)) for _ in range(3))
    done = 0
    with torch.no_grad(), autocast(precision, model.device.type):
        for inputs in batches([examples[place] for place in order], batch_size, pad_id):
            logits = answer_logits(model, inputs).float()
            labels = inputs.labels.to(logits.device)
            counted = labels != -100
            each = cross_entropy(logits.transpose(1, 2), labels, reduction="none").double().sum(1)
            places = order[done : done + len(labels)]
            losses[places] = each.cpu().numpy()
            tokens[places] = counted.sum(1).cpu().numpy()
            exact[places] = ((logits.argmax(-1) == labels) | ~counted).all(1).cpu().numpy()
            done += len(labels)
    return Answers(losses, tokens, exact)


def score(model: Any, examples: Sequence[Tokens], pad_id: int, batch_size: int, precision: Precision) -> Score:
    """Mean loss (nats) over all answer tokens, and the share of answers that greedy decoding gives exactly."""
    found = score_each(model, examples, pad_id, batch_size, precision)
    tokens = int(found.tokens.sum())
    return Score(float(found.losses.sum()) / tokens, float(found.exact.mean()), tokens, len(examples))


def mean_loss(scores: Sequence[Score]) -> float:
    """Mean of the losses, each set counting the same."""
    return sum(found.loss for found in scores) / len(scores)
