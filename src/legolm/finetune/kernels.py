"""The hot operations of a training step, each with its own backward pass.

On a CPU what is not a matrix product is bound by memory, so each function reads and writes as little as it can, keeps
for backward what is small and recomputes what is cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from legolm.finetune.per_example import splitting


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ with W (out, in) frozen; products in W's dtype, A (r, in) and B (out, r) float32.

    `joint` (out + r, in + r) holds W in its corner and has room for s·B and A beside it, so that both terms are one
    product, [x, x Aᵀ] [W, s·B]ᵀ, and round once. Added to a bfloat16 x Wᵀ, a young adapter's term is less than half
    of its last place and would round away: not noise, but a loss as if s were smaller.

    Saves x and x Aᵀ. No gradient is made for W, nor for x where nothing below it trains.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, joint: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> Tensor:
        rows, columns = len(b), a.shape[1]
        torch.mul(b, scale, out=joint[:rows, columns:])
        joint[rows:, :columns] = a
        flat = x.flatten(0, -2).to(joint.dtype)
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        down = linear(dropped, joint[rows:, :columns])
        y = linear(torch.cat([flat, down], 1), joint[:rows], bias)
        ctx.save_for_backward(dropped, down, kept)
        ctx.joint, ctx.inner, ctx.factors = joint, (rows, columns), (id(a), id(b))
        ctx.shape, ctx.dtype, ctx.scale, ctx.dropout = x.shape, x.dtype, scale, dropout
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, down, kept = ctx.saved_tensors
        joint, (rows, columns) = ctx.joint, ctx.inner
        g = grad.flatten(0, -2).to(joint.dtype)
        up = g @ joint[:rows, columns:]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            if kept is None:
                dx = torch.cat([g, up], 1) @ joint[:, :columns]
            else:
                dx = g @ joint[:rows, :columns] + (up @ joint[rows:, :columns]).mul_(kept).div_(1 - ctx.dropout)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        if (parts := splitting()) is not None:
            if ctx.needs_input_grad[3]:
                pairs = parts.pairs(up, x)
                parts.add(ctx.factors[0], [u.t() @ one for u, one in pairs])
            if ctx.needs_input_grad[4]:
                pairs = parts.pairs(down, g)
                parts.add(ctx.factors[1], [ctx.scale * (d.t() @ one).t() for d, one in pairs])
            return dx, None, None, None, None, None, None
        if ctx.needs_input_grad[3]:
            da = (up.t() @ x).float()
        if ctx.needs_input_grad[4]:
            # The thin factor first: half the time of gᵀ down.
            db = ctx.scale * (down.t() @ g).t().float()
        return dx, None, None, da, db, None, None
