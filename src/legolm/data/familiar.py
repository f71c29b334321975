"""Which questions are like a client's own, told by what stands in their prompts.

A likelihood ratio against public text, as in Ren et al., "Likelihood Ratios for Out-of-Distribution Detection" (2019,
arXiv 1906.02845), of a model that a few hundred prompts suffice for: each token, and each two to five in a row, is in
a prompt or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from legolm.data.render import Tokens

FAR_OUT, STRAY = 3.0, 0.02
"""Quartile distances below the first quartile (Tukey, "Exploratory Data Analysis", 1977), and the share of the rows
that may be there: one that is none of the client's own by mistake must not draw the line where everything is."""
LONGEST = 5
"""The months of one task are told by what stands on both sides of them."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, near 2⁶⁴ over the golden ratio: of some thousand grams hardly two get one number."""


@dataclass(frozen=True)
class Seen:
    """In how many of so many `prompts` each gram is, one to `LONGEST` tokens in a row: grams ascending (n,) int64,
    counts (n,) int64."""

    prompts: int
    grams: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Iterable[Tokens]) -> Seen:
        """Of these examples' prompts."""
        each = [_grams(one) for one in rows]
        grams, counts = np.unique(np.concatenate(each or [np.zeros(0, np.int64)]), return_counts=True)
        return Seen(len(each), torch.from_numpy(grams), torch.from_numpy(counts.astype(np.int64)))

    def packed(self) -> Tensor:
        """Grams and counts as bytes: (16 n,) uint8."""
        return torch.cat([self.grams, self.counts]).view(torch.uint8)

    @staticmethod
    def unpacked(prompts: int, packed: Tensor) -> Seen:
        """What `packed` gave. Raises `ValueError` for what is none."""
        if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) % 16:
            raise ValueError(f"{packed.dtype} of shape {tuple(packed.shape)} are no grams and counts")
        grams, counts = packed.clone().view(torch.int64).chunk(2)
        if bool((counts < 1).any()):
            raise ValueError("a gram that is seen has a count below 1")
        return Seen(prompts, grams, counts)

    def shares(self) -> dict[int, float]:
        """What part of the prompts has each gram."""
        return {
            gram: count / self.prompts for gram, count in zip(self.grams.tolist(), self.counts.tolist(), strict=True)
        }


@dataclass(frozen=True)
class Familiar:
    """What tells a client's own questions: of each gram log p_own − log p_public (nats), and the `least` sum over the
    grams of a prompt with which it counts as known. A gram that neither has seen says nothing.
    """

    gains: Mapping[int, float]
    least: float

    @staticmethod
    def of(own: Sequence[Tokens], public: Seen, away: float) -> Familiar:
        """By a client's training examples and the public ones.

        The line is drawn so that of the own ones, each scored by the others alone, it knows all but the share `away`
        (of those to come, where that is less than one of these) and, of a few, what is `FAR_OUT`. Raises `ValueError`
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
        # Without one of n prompts a gram's share is (c - 1) / (n - 1), not c / n.
        less = {
            id: math.log(max((count - 1) / (seen.prompts - 1), unseen)) - math.log(count / seen.prompts)
            for id, count in zip(seen.grams.tolist(), seen.counts.tolist(), strict=True)
        }
        without = Familiar({id: gain + less.get(id, 0.0) for id, gain in gains.items()}, 0.0)
        return Familiar(gains, _line([without.score(one) for one in own], away))

    def score(self, example: Tokens) -> float:
        """Log-likelihood ratio of its prompt, nats."""
        return math.fsum(self.gains.get(gram, 0.0) for gram in _grams(example).tolist())

    def knows(self, example: Tokens) -> bool:
        """Whether the question is like the client's own."""
        return self.score(example) >= self.least

    def parted(self, examples: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
        """Those that it knows, and the others, each in their order."""
        found: tuple[list[Tokens], list[Tokens]] = [], []
        for one in examples:
            found[not self.knows(one)].append(one)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """As `read` takes them."""
        grams = sorted(self.gains)
        gains = torch.tensor([self.gains[gram] for gram in grams], dtype=torch.float64)
        return {"hashes": torch.tensor(grams), "gains": gains, "least": torch.tensor([self.least], dtype=torch.float64)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Familiar:
        """What `tensors` gave. Raises `ValueError` for what is none."""
        grams, gains, least = (tensors.get(name) for name in ("hashes", "gains", "least"))
        if grams is None or gains is None or least is None or grams.shape != gains.shape or least.shape != (1,):
            raise ValueError("it is no record of what a client's own questions are")
        return Familiar(dict(zip(grams.tolist(), gains.tolist(), strict=True)), float(least))


def _line(scores: Sequence[float], away: float) -> float:
    """Below which the share `away` of what has these scores is.

    One more has a chance of 1 / (n + 1) to be below all n of them. Where that is too much, the tail goes on as it is
    within them, exponentially: as far down for half the share as from the tenth to the twentieth (Pickands,
    "Statistical Inference Using Extreme Order Statistics", 1975).
    """
    first, third, tenth, twentieth = np.quantile(scores, [0.25, 0.75, 0.1, 0.05])
    least, few = np.quantile(scores, [away, STRAY], method="lower")
    if (part := away * len(scores)) < 1:
        least = least + (tenth - twentieth) * math.log2(part) if part else -math.inf
    return float(max(least, min(few, first - FAR_OUT * (third - first))))


def _grams(example: Tokens) -> np.ndarray:
    """Of the prompt, each once, ascending: tokens in a row as the digits of a number, hashed to int64, not negative."""
    ids = np.asarray(example.ids[: example.answer], dtype=np.uint64) + np.uint64(1)
    found, longer = list[np.ndarray](), np.zeros(len(ids) + 1, dtype=np.uint64)
    for n in range(min(LONGEST, len(ids))):
        longer = longer[:-1] * FACTOR + ids[n:]  # modulo 2⁶⁴
        mixed = (longer ^ longer >> np.uint64(32)) * FACTOR
        found.append((mixed >> np.uint64(1)).astype(np.int64))
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))
