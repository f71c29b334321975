"""What rounds of noise cost: (ε, δ) by `dp-accounting`, and the noise that a budget asks for.

Client level: one client is added or removed. It is in the rounds that it is asked in, which are drawn by the run's
seed: no secret, so nothing is gained by sampling, and a client's rounds are Gaussian mechanisms one after the other. Of
noise multipliers z_i they are together one of 1 / √(Σ 1 / z_i²), whose ε is exact (Balle and Wang, arXiv 1805.06530).

Example level: one example is added or removed. Batches are Poisson samples of a rate that the client draws from its own
entropy: RDP of the sampled Gaussian mechanism (Mironov et al., arXiv 1908.10530), an upper bound.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from legolm.config import DpConfig
from legolm.errors import LegolmError, PublicError

ROUNDING = 1 + 1e-9
"""Of a budget that the noise was found for."""
ORDERS = [*range(2, 64), *range(64, 257, 16), 512, 1024]
"""Of Rényi divergence. Whole ones: of others the library's series need not converge."""
NOISE = LEAST, MOST = 0.01, 1e8
"""Noise multipliers that are looked at for a budget."""
Steps = tuple[float, float, float]
"""(noise multiplier, share of the examples in a batch, number of steps)."""


def gaussian_epsilon(multipliers: Sequence[float], delta: float) -> float:
    """ε of Gaussian mechanisms with these noise multipliers one after the other; 0 without any."""
    if not multipliers:
        return 0.0
    with np.errstate(all="ignore"):  # of next to no noise
        return float(_library().get_epsilon_gaussian(1 / math.sqrt(sum(z**-2 for z in multipliers)), delta))


def sampled_epsilon(steps: Sequence[Steps], delta: float) -> float:
    """ε of steps of DP-SGD one after the other; 0 without any."""
    library = _library()
    accountant = library.rdp.RdpAccountant(ORDERS)
    for multiplier, rate, count in steps:
        accountant.compose(_sampled(multiplier, rate), round(count))
    return float(accountant.get_epsilon(delta)) if steps else 0.0


def sampled_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier, to a thousandth of it, with which so many steps of DP-SGD stay within (ε, δ).

    At least `LEAST`. Raises `LegolmError` where none does.
    """
    low, high = LEAST, MOST
    if sampled_epsilon([(low, rate, steps)], delta) <= epsilon:
        return low
    if sampled_epsilon([(high, rate, steps)], delta) > epsilon:
        raise PublicError(
            f"privacy.dp.epsilon {epsilon:g}: no noise reaches it in {steps} steps at delta {delta:g}; raise either, "
            "or make fewer steps"
        )
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if sampled_epsilon([(middle, rate, steps)], delta) <= epsilon else (middle, high)
    return high


@dataclass(frozen=True)
class Budget:
    """Of a run at client level: who is asked in each round (from the first on), and the noise of finished rounds.

    All of it is known before anything is trained, and nothing depends on data.
    """

    dp: DpConfig
    asked: Sequence[Collection[str]]
    done: Sequence[float] = ()

    @property
    def multiplier(self) -> float:
        """z of the rounds to come: the configured one, or the least with which all of them stay within the budget.

        Raises `LegolmError` where the finished rounds have spent it.
        """
        if self.dp.noise_multiplier is not None:
            return self.dp.noise_multiplier
        assert self.dp.epsilon is not None
        with np.errstate(all="ignore"):
            whole = float(_library().get_sigma_gaussian(self.dp.epsilon, self.dp.delta)) ** -2
        needed = [0.0]
        for client in {id for round in self.asked for id in round}:
            rounds = [number for number, there in enumerate(self.asked) if client in there]
            left = whole - sum(self.done[number] ** -2 for number in rounds if number < len(self.done))
            to_come = sum(number >= len(self.done) for number in rounds)
            if to_come and left <= whole * 1e-9:
                raise LegolmError(
                    f"privacy.dp.epsilon {self.dp.epsilon:g} is spent by the {len(self.done)} rounds that are done; "
                    "raise nothing but the budget of a new run, or end with federation.rounds as it was"
                )
            needed.append(math.sqrt(to_come / left) if to_come else 0.0)
        return max(needed) or math.inf

    def epsilon(self, rounds: int) -> float:
        """What the client who is asked most has spent after so many rounds."""
        noise = [*self.done, *([self.multiplier] * (rounds - len(self.done)) if rounds > len(self.done) else ())]
        spent = {
            client: tuple(z for z, there in zip(noise, self.asked[:rounds], strict=False) if client in there)
            for client in {id for round in self.asked[:rounds] for id in round}
        }
        most = max(spent.values(), key=lambda multipliers: sum(z**-2 for z in multipliers), default=())
        return gaussian_epsilon(most, self.dp.delta)

    @property
    def rounds(self) -> int:
        """How many rounds can be made within the budget: all, or up to the first that would pass it."""
        if self.dp.epsilon is None or (self.dp.noise_multiplier is None and not self.done):
            return len(self.asked)
        return within(self.dp.epsilon, self.epsilon, len(self.asked))


def within(budget: float, epsilon: Callable[[int], float], rounds: int) -> int:
    """The most of so many rounds whose `epsilon(rounds)`, which grows, stays within the budget."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon(middle) <= budget * ROUNDING else (low, middle - 1)
    return low


def noise_to_signal(multiplier: float, entries: int, clients: float) -> float:
    """How long the noise on a sum is beside the longest that the sum can be: z √d / n, whatever the clipping norm."""
    return multiplier * math.sqrt(entries) / clients


def _sampled(multiplier: float, rate: float) -> Any:
    library = _library()
    gaussian = library.GaussianDpEvent(multiplier)
    return gaussian if rate >= 1 else library.PoissonSampledDpEvent(rate, gaussian)


def _library() -> Any:
    """`dp_accounting`, which takes a second to import: only where there is something to account."""
    try:
        import dp_accounting
        from dp_accounting import rdp  # noqa: F401 (an attribute from now on)
    except ImportError:
        raise PublicError("privacy.dp: needs dp-accounting; pip install 'legolm[privacy]'") from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # where a divergence rounds to zero it says so each time
    return dp_accounting
