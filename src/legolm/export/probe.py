"""Whether a runtime computes what the checkpoint does: next-token distributions after the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from legolm.data import help_tokens
from legolm.errors import LegolmError

LIKELIEST = 256
"""Tokens of a distribution that are compared one by one; the others together."""


@dataclass(frozen=True)
class Reference:
    """Tokens (n,), and log-probabilities (n - read, vocabulary) of the checkpoint for all but the first `read`."""

    ids: list[int]
    read: int
    logits: Tensor

    @staticmethod
    def of(model: Any, tokenizer: Any, read: int, asked: int) -> Reference:
        """Of a model in float32: `read` tokens of prose at once, and `asked` more, one after the other."""
        ids = help_tokens(tokenizer, read + asked)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, read - 1 : -1].float()
        return Reference(ids, read, log_softmax(logits, -1))


@dataclass(frozen=True)
class Measured:
    """How a runtime's distributions differ from the checkpoint's.

    `error`: root mean square of the difference of log-probabilities over their own standard deviation, over the
    likeliest tokens. `kl` (nats): KL(checkpoint ‖ runtime) of those and the rest. `same`: share of positions with the
    same likeliest token. Perplexities are of the asked tokens; `stderr` is of their ratio, from differences by token.
    """

    error: float
    kl: float
    same: float
    perplexity: float
    reference: float
    stderr: float

    @property
    def ratio(self) -> float:
        """The runtime's perplexity over the checkpoint's."""
        return self.perplexity / self.reference

    def said(self) -> str:
        """In a line."""
        return (
            f"error {self.error:.2g}, KL {self.kl:.2g} nats, same likeliest token {self.same:.0%}, perplexity "
            f"{self.perplexity:.4g} ({self.ratio:.4f} ± {self.stderr:.4f} of the checkpoint's {self.reference:.4g})"
        )


@dataclass(frozen=True)
class Limits:
    """What an export may differ by at most."""

    error: float
    kl: float = math.inf

    def check(self, found: Measured, what: str) -> None:
        """Raise `LegolmError` for more."""
        if not (found.error <= self.error and found.kl <= self.kl):  # NaN is no less than anything
            raise LegolmError(
                f"{what} does not compute what the checkpoint does ({found.said()}; at most {self.error:g} and "
                f"{self.kl:g} are taken): nothing was exported"
            )


Answer = Callable[[Sequence[int], int], tuple[float, dict[int, float]]]
"""(ids, token) -> log-probability of the token after them, and of the likeliest ones by id."""


def measure(reference: Reference, answer: Answer) -> Measured:
    """Ask a runtime for each token after those before it."""
    squares, spreads, divergences, same, losses = [], [], [], 0, []
    for place in range(reference.read, len(reference.ids)):
        wanted = reference.logits[place - reference.read].double()
        loss, found = answer(reference.ids[:place], reference.ids[place])
        ids = torch.tensor(list(found))
        theirs, ours = torch.tensor(list(found.values()), dtype=torch.float64), wanted[ids]
        squares.append(float((theirs - ours).square().mean()))
        spreads.append(float(ours.var(correction=0)))
        divergences.append(_divergence(ours, theirs))
        same += int(ids[theirs.argmax()]) == int(wanted.argmax())
        losses.append((loss, float(wanted[reference.ids[place]])))
    count = len(losses)
    own, its = (math.exp(-sum(pair[side] for pair in losses) / count) for side in (0, 1))
    error = math.sqrt(sum(squares) / max(sum(spreads), 1e-12))
    lost = torch.tensor([its - own for own, its in losses], dtype=torch.float64)
    stderr = own / its * float(lost.std(correction=0)) / math.sqrt(count)
    return Measured(error, sum(divergences) / count, same / count, own, its, stderr)


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """KL of the likeliest tokens and one for all others, from log-probabilities."""
    p, q = ours.exp(), theirs.exp()
    rest = max(1 - float(p.sum()), 0.0), max(1 - float(q.sum()), 0.0)
    total = float((p * (ours - theirs)).sum())
    return total + (rest[0] * math.log(rest[0] / max(rest[1], 1e-12)) if rest[0] > 1e-9 else 0.0)
