"""The Gaussian mechanism on a round's sum: clip what a client sends, add noise to N.

Sensitivity. N = Σ_k Δ_k over a round's clients, each counting 1 and clipped to ‖Δ_k‖₂ ≤ C over *all* coordinates that
it holds, whatever its block. Placed in the LLM's coordinates a change keeps its norm, so

    without client k (its change is zero) N moves by at most C, with another in its place by at most 2 C.

D is the number of clients asked that hold an entry: public, and the same whether client k answers or not. So nothing of
N / D but N depends on what client k has, and noise of standard deviation z C on each entry of N makes a round the
Gaussian mechanism of noise multiplier z (add or remove one client; Dwork and Roth 2014, appendix A; Balle and Wang,
arXiv 1805.06530). Noise on N / D would be too little where few hold an entry: there a client moves the mean by more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from legolm.adapter import Tensors
from legolm.config import DpConfig
from legolm.errors import PublicError

BELOW = 1 - 2.0**-20
"""Of the bound: rounding to float32 must not lead above it."""


def deviation(dp: DpConfig) -> float:
    """Of the noise on N. Raises `LegolmError` for settings that a request left open."""
    if dp.noise_multiplier is None:
        raise PublicError("privacy.dp: the request says noise distributed, and not how much")
    return dp.noise_multiplier * dp.clip


def norm(delta: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors together, float64."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in delta.values()))


def clipped(delta: Mapping[str, Tensor], bound: float) -> Mapping[str, Tensor]:
    """The change, scaled down to this L2 norm over all its tensors if it is longer."""
    size = norm(delta)
    if size <= bound:
        return delta
    return {key: tensor * (BELOW * bound / size) for key, tensor in delta.items()}


def gaussian(shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float64, from the system's entropy.

    Not from the run's seed: who knows that could take the noise off again. By Box and Muller from 53 random bits each.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    one, two = (torch.from_numpy(((half >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53) for half in bits)
    radius, angle = (-2 * one.log()).sqrt(), 2 * math.pi * two
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(*shape)


def with_share(delta: Mapping[str, Tensor], std: float, holders: Tensors, dropouts: int) -> Tensors:
    """A client's change (float32) with its part of the noise whose sum has at least this standard deviation.

    `holders` has how many of the round's clients hold an entry, by key in the shape of the change. An entry of h
    holders gets from each the variance std² / max(1, h − dropouts): the parts that arrive are enough without any
    `dropouts` of them, or nobody's change of that entry arrives.
    """
    return {
        key: (tensor + gaussian(tensor.shape) * (std / (holders[key].double() - dropouts).clamp(min=1).sqrt())).float()
        for key, tensor in delta.items()
    }
