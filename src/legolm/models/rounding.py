"""Rounding weights to the dtype that they are kept in, without losing what was learned."""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED_BITS = 16
"""Bits of a float32 that a bfloat16 has not."""
_NOISE = 16_381
"""Random numbers of a matrix, which come again: they take four times as long as all else. A prime: no two rows of a
matrix have the same ones in the same columns."""


def rounded(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Cast float32 `values`; to bfloat16 by stochastic rounding (Gupta et al., arXiv 1502.02551) with this seed.

    Weights of a checkpoint lie on its dtype's grid already, and a young adapter changes most of them by less than half
    of bfloat16's last place: rounding to the nearest would put them all back. Rounded up or down with the odds of
    where they lie, they keep the change in the mean. What lies on the grid stays as it is, zeros included.
    """
    if dtype != torch.bfloat16 or values.dtype == dtype:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(seed)
    count = max(1, min(_NOISE, values.numel()))
    noise = torch.randint(1 << _DROPPED_BITS, (count,), dtype=torch.int32, device=values.device, generator=generator)
    bits = values.clone(memory_format=torch.contiguous_format).view(torch.int32).flatten()
    whole = len(bits) - len(bits) % count
    bits[:whole].view(-1, count).add_(noise)
    bits[whole:].add_(noise[: len(bits) - whole])
    return bits.bitwise_and_(-(1 << _DROPPED_BITS)).view(torch.float32).view(values.shape).to(dtype)
