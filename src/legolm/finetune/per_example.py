"""Gradients of each example by itself, from the one backward pass of all: DP-SGD (Abadi et al., arXiv 1607.00133).

Examples stand one after the other in a pack and meet nowhere (`models.packing`), so of a linear layer's factors example
i's gradient is the part of the product over its own tokens: ∂B_i = s Σ_{t∈i} g_t (A x_t)ᵀ. While `apart` lasts, the
backward passes of `LoraLinear` and `MaskedLinear` put these parts here instead of adding them up. Where one side is
frozen a part has as many entries as the factor that trains, and a batch's parts are small beside its activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from legolm.config import DpConfig, TrainConfig
from legolm.errors import PublicError
from legolm.privacy import BELOW, gaussian, sampled_epsilon, sampled_noise


class Parts:
    """Each factor's gradient by example, float32, of one pack of examples of these lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._found: dict[int, Tensor] = {}

    def pairs(self, one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each example's tokens of both, (tokens of the pack, anything)."""
        return zip(torch.split(one, self.lengths), torch.split(other, self.lengths), strict=True)

    def add(self, factor: int, parts: Sequence[Tensor]) -> None:
        """Of the factor of this `id`: one part an example, each in its shape."""
        self._found[factor] = torch.stack([part.float() for part in parts])

    def of(self, factors: Sequence[nn.Parameter]) -> list[Tensor]:
        """(examples, factor's shape) of each of these."""
        return [self._found[id(factor)] for factor in factors]

    def clipped(self, factors: Sequence[nn.Parameter], bound: float) -> list[Tensor]:
        """Σ_i of each factor over examples, each scaled down to an L2 norm of `bound` over all factors together.

        An example whose gradient is not finite adds nothing.
        """
        found = self.of(factors)
        squares = torch.stack([part.flatten(1).double().square().sum(1) for part in found]).sum(0)
        scale = (BELOW * bound / squares.sqrt()).clamp(max=1.0)
        scale = torch.where(squares.isfinite(), scale, 0.0).float()
        return [torch.einsum("i,i...->...", scale, part.nan_to_num(0.0, 0.0, 0.0)) for part in found]


_now: list[Parts] = []


@contextmanager
def apart(lengths: Sequence[int]) -> Iterator[Parts]:
    """While it lasts, backward passes leave each example's gradient here, and none at the factors."""
    parts = Parts(lengths)
    _now.append(parts)
    try:
        yield parts
    finally:
        _now.remove(parts)


def splitting() -> Parts | None:
    """Where parts go now, if they go apart."""
    return _now[-1] if _now else None


@dataclass(frozen=True)
class Private:
    """DP-SGD on so many examples: each is in a batch with probability `rate`, and a step has noise of z · clip."""

    examples: int
    rate: float
    clip: float
    multiplier: float

    @staticmethod
    def of(dp: DpConfig, examples: int, config: TrainConfig, steps: int, now: int = 0) -> Private:
        """Batches as large as configured on average; the noise is given, or what the budget asks for in all `steps`.

        Raises `LegolmError` for a δ of one over the examples or more, for a budget that no noise reaches, and one that
        the steps of `now` would pass by themselves: of a client whose rate it does not know yet the server cannot say.
        """
        rate = min(1.0, config.batch_size / examples)
        if dp.delta >= 1 / examples:
            raise PublicError(
                f"privacy.dp.delta {dp.delta:g}: may show one of {examples} examples whole; take a far smaller one"
            )
        if dp.noise_multiplier is not None:
            cost = sampled_epsilon([(dp.noise_multiplier, rate, now)] if now else [], dp.delta)
            if dp.epsilon is not None and cost > dp.epsilon:
                raise PublicError(
                    f"privacy.dp.epsilon {dp.epsilon:g}: {now} steps of {examples} examples with noise_multiplier "
                    f"{dp.noise_multiplier:g} cost {cost:.3g}; raise the noise, or lower train.steps or batch_size"
                )
            return Private(examples, rate, dp.clip, dp.noise_multiplier)
        if dp.epsilon is None:
            raise PublicError("privacy.dp: level example needs noise_multiplier or epsilon")
        return Private(examples, rate, dp.clip, sampled_noise(dp.epsilon, dp.delta, rate, steps))

    def batches(self) -> Iterator[list[int]]:
        """Endless Poisson samples, some perhaps empty, by the system's entropy: who knows the draw undoes its gain."""
        # A standard normal is below its quantile with this probability.
        below = torch.special.ndtri(torch.tensor(self.rate, dtype=torch.float64))
        while True:
            yield (gaussian((self.examples,)) <= below).nonzero()[:, 0].tolist()

    def disturb(self, factors: Sequence[nn.Parameter]) -> None:
        """(Σ + noise) / expected batch in place of the summed gradients; of an empty batch it is noise alone."""
        for factor in factors:
            noise = (self.multiplier * self.clip * gaussian(factor.shape)).to(factor.device, torch.float32)
            factor.grad = (noise if factor.grad is None else factor.grad + noise) / (self.rate * self.examples)
