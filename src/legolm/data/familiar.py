"""Which questions are like a client's own, told by the tokens of their prompts.

A likelihood ratio against public text, as in Ren et al., "Likelihood Ratios for Out-of-Distribution Detection" (2019,
arXiv 1906.02845), of a model that a few hundred prompts suffice for: each token is in a prompt or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from legolm.data.render import Tokens

KEPT = 0.97
"""Share of a client's own questions that it is to know as its own."""


@dataclass(frozen=True)
class Seen:
    """In how many of so many `prompts` each token is: ids ascending (n,) int64, counts (n,) int64."""

    prompts: int
    tokens: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Iterable[Tokens]) -> Seen:
        """Of these examples' prompts."""
        each = [np.unique(one.ids[: one.answer]) for one in rows]
        tokens, counts = np.unique(np.concatenate(each or [np.zeros(0, np.int64)]), return_counts=True)
        return Seen(len(each), torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(counts.astype(np.int64)))

    def shares(self) -> dict[int, float]:
        """What part of the prompts has each token."""
        return {id: count / self.prompts for id, count in zip(self.tokens.tolist(), self.counts.tolist(), strict=True)}


@dataclass(frozen=True)
class Familiar:
    """What tells a client's own questions: of each token log p_own − log p_public (nats), and the `least` sum over the
    tokens of a prompt with which it counts as known. A token that neither has seen says nothing.
    """

    gains: Mapping[int, float]
    least: float

    @staticmethod
    def of(own: Sequence[Tokens], public: Seen) -> Familiar:
        """By a client's training examples and the public ones.

        The line is drawn so that of the own ones, each scored by the others alone, it knows `KEPT`. Raises `ValueError`
        for fewer than two own examples, and where there are no public ones.
        """
        if len(own) < 2 or not public.prompts:
            raise ValueError(f"{len(own)} own questions and {public.prompts} public ones are too few")
        seen = Seen.of(own)
        ours, theirs = seen.shares(), public.shares()
        unseen = 1 / (2 * max(seen.prompts, public.prompts))
        gains = {
            id: math.log(ours.get(id, unseen)) - math.log(theirs.get(id, unseen)) for id in ours.keys() | theirs.keys()
        }
        # Without one of n prompts a token's share is (c - 1) / (n - 1), not c / n.
        less = {
            id: math.log(max((count - 1) / (seen.prompts - 1), unseen)) - math.log(count / seen.prompts)
            for id, count in zip(seen.tokens.tolist(), seen.counts.tolist(), strict=True)
        }
        without = Familiar({id: gain + less.get(id, 0.0) for id, gain in gains.items()}, 0.0)
        scores = [without.score(one) for one in own]
        return Familiar(gains, float(np.quantile(scores, 1 - KEPT, method="lower")))

    def score(self, example: Tokens) -> float:
        """Log-likelihood ratio of its prompt, nats."""
        return math.fsum(self.gains.get(int(id), 0.0) for id in np.unique(example.ids[: example.answer]))

    def knows(self, example: Tokens) -> bool:
        """Whether the question is like the client's own."""
        return self.score(example) >= self.least

    def tensors(self) -> dict[str, Tensor]:
        """As `read` takes them."""
        ids = sorted(self.gains)
        gains = torch.tensor([self.gains[id] for id in ids], dtype=torch.float64)
        return {"tokens": torch.tensor(ids), "gains": gains, "least": torch.tensor([self.least], dtype=torch.float64)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Familiar:
        """What `tensors` gave. Raises `ValueError` for what is none."""
        tokens, gains, least = (tensors.get(name) for name in ("tokens", "gains", "least"))
        if tokens is None or gains is None or least is None or tokens.shape != gains.shape or least.shape != (1,):
            raise ValueError("it is no record of what a client's own questions are")
        return Familiar(dict(zip(tokens.tolist(), gains.tolist(), strict=True)), float(least))
