"""RMS norm in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """y = gain ∘ x / sqrt(mean(x²) + eps) over the last dimension, computed in float32 and given in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        wide = x.float()
        power = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = torch.rsqrt(power.div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, gain, inverse)
        return (wide * inverse).mul_(gain).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gain, inverse = ctx.saved_tensors
        # Operations on mixed dtypes cost twice a cast.
        g, wide = grad.float() * gain, x.float()
        along = (g * wide).sum(-1, keepdim=True) * inverse.pow(3) / x.shape[-1]
        return g.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None, None
