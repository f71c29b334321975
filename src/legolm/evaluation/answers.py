"""How well a model answers: loss per answer token and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from legolm.config import Precision
from legolm.data import Tokens
from legolm.evaluation.figure import Array, ratio_figure
from legolm.models import Head, autocast, hidden_states, judged, lean, pack, shared_prompt
from legolm.runs import Score


@dataclass(frozen=True)
class Answers:
    """Example by example, each (n,) float64: loss summed over the answer (nats), its tokens, 1 if exact else 0."""

    losses: Array
    tokens: Array
    exact: Array

    @staticmethod
    def joined(parts: Sequence[Answers]) -> Answers:
        """One after the other."""
        each = [np.concatenate([getattr(one, name) for one in parts]) for name in ("losses", "tokens", "exact")]
        return Answers(*each)

    @property
    def score(self) -> Score:
        """Mean loss (nats) over all answer tokens, and the share of answers that greedy decoding gives exactly."""
        loss = ratio_figure(self.losses, self.tokens, "")
        return Score(
            loss=loss.value,
            stderr=loss.stderr,
            exact_match=float(self.exact.mean()),
            tokens=int(self.tokens.sum()),
            examples=len(self.tokens),
        )


def score_each(model: Any, examples: Sequence[Tokens], batch_size: int, precision: Precision) -> Answers:
    """Loss and exactness of each answer, in the order of `examples`.

    Greedy decoding gives the answer and its end exactly when each of their tokens is the likeliest after the true
    ones before it, so one forward pass decides it and nothing is generated.
    """
    # Longest first: examples of similar length share attention, and memory fails at once or never.
    order = np.array(sorted(range(len(examples)), key=lambda place: -len(examples[place].ids)))
    losses, exact = np.zeros(len(examples)), np.ones(len(examples))
    with torch.no_grad(), autocast(precision, model.device.type), lean(model, precision):
        head = Head.of(model, precision)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = [examples[place] for place in places]
            packing = pack(batch, model.device, shared_prompt(model, batch))
            each, right = judged(hidden_states(model, packing)[packing.predict], head, packing.labels)
            owners = places[packing.owner.cpu().numpy()]
            np.add.at(losses, owners, each.cpu().double().numpy())
            np.minimum.at(exact, owners, right.cpu().double().numpy())
    return Answers(losses, np.array([len(one.ids) - one.answer for one in examples], dtype=np.float64), exact)


def score(model: Any, examples: Sequence[Tokens], batch_size: int, precision: Precision) -> Score:
    """Mean loss (nats) over all answer tokens, and the share of answers that greedy decoding gives exactly."""
    return score_each(model, examples, batch_size, precision).score
