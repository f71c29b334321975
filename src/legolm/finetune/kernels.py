"""The hot operations of a training step, each with its own backward pass.

On a CPU what is not a matrix product is bound by memory, so each function reads and writes as little as it can, keeps
for backward what is small and recomputes what is cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ with W (out, in) frozen; products in W's dtype, A (r, in) and B (out, r) float32.

    Saves x and x Aᵀ. No gradient is made for W, nor for x where nothing below it trains.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> Tensor:
        flat = x.flatten(0, -2).to(weight.dtype)
        low_a, low_b = a.to(weight.dtype), (scale * b).to(weight.dtype)
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        down = linear(dropped, low_a)
        y = linear(flat, weight, bias).addmm_(down, low_b.t())
        ctx.save_for_backward(dropped, weight, low_a, low_b, down, kept)
        ctx.shape, ctx.dtype, ctx.scale, ctx.dropout = x.shape, x.dtype, scale, dropout
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, low_a, low_b, down, kept = ctx.saved_tensors
        g = grad.flatten(0, -2).to(weight.dtype)
        up = g @ low_b
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            if kept is None:
                dx.addmm_(up, low_a)
            else:
                dx += (up @ low_a).mul_(kept).div_(1 - ctx.dropout)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            da = (up.t() @ x).float()
        if ctx.needs_input_grad[4]:
            db = ctx.scale * (g.t() @ down).float()
        return dx, None, None, da, db, None, None


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
