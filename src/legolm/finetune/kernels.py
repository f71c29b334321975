"""The hot operations of a training step, each with its own backward pass.

On a CPU what is not a matrix product is bound by memory, so each function reads and writes as little as it can, keeps
for backward what is small and recomputes what is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from legolm.finetune.per_example import splitting


class Joint:
    """Frozen weights W (out, in) of linear layers that read the same x, below one another, in `dtype`.

    `matrix` (Σ out + Σ r, in + Σ r) has room for s·B beside each W and for all A below, so that both terms of each
    layer are one product, [x, x Aᵀ] [W, s·B]ᵀ, and round once. Added to a bfloat16 x Wᵀ, a young adapter's term is less
    than half of its last place and would round away: not noise, but a loss as if s were smaller.
    """

    def __init__(self, weights: Sequence[Tensor], ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.sizes, self.ranks = [len(weight) for weight in weights], list(ranks)
        self.rows, columns = sum(self.sizes), weights[0].shape[1]
        size = self.rows + sum(ranks), columns + sum(ranks)
        self.matrix = torch.empty(size, dtype=dtype, device=weights[0].device)
        self.forward, self.backward = self.matrix[: self.rows], self.matrix[:, :columns]
        self.weight, self.a = self.backward[: self.rows], self.backward[self.rows :]
        self.weights, self.a_places = self.weight.split_with_sizes(self.sizes), self.a.split_with_sizes(self.ranks)
        beside = self.forward[:, columns:].split_with_sizes(self.sizes)
        self.b_places = [part.split_with_sizes(self.ranks, 1)[place] for place, part in enumerate(beside)]
        self.matrix[:, columns:] = 0
        for place, weight in zip(self.weights, weights, strict=True):
            place.copy_(weight)


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ of each layer of a `Joint`; first come all A (r, in), then all B (out, r), float32.

    `bias` is theirs one after the other, or None. Saves x and x Aᵀ. No gradient is made for W, nor for x where nothing
    below it trains. Dropout takes the same of x for all.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, joint: Joint, bias: Tensor | None, scale: float, dropout: float, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(joint.ranks)
        for place, a in zip(joint.a_places, factors[:count], strict=True):
            place.copy_(a)
        for place, b in zip(joint.b_places, factors[count:], strict=True):
            torch.mul(b, scale, out=place)
        flat = x.flatten(0, -2).to(joint.matrix.dtype)
        dropped, kept = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        down = linear(dropped, joint.a)
        y = linear(torch.cat([flat, down], 1), joint.forward, bias)
        ctx.save_for_backward(dropped, down, kept)
        ctx.joint, ctx.factors = joint, [id(factor) for factor in factors]
        ctx.shape, ctx.dtype, ctx.scale, ctx.dropout = x.shape, x.dtype, scale, dropout
        return y.view(*x.shape[:-1], joint.rows).split_with_sizes(joint.sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, down, kept = ctx.saved_tensors
        joint, dx = ctx.joint, None
        gs = [grad.flatten(0, -2).to(joint.matrix.dtype) for grad in grads]
        ups = [g @ b for g, b in zip(gs, joint.b_places, strict=True)]
        both = torch.cat([*gs, *ups], 1)
        up = both[:, joint.rows :]
        if ctx.needs_input_grad[0]:
            if kept is None:
                dx = both @ joint.backward
            else:
                dx = both[:, : joint.rows] @ joint.weight + (up @ joint.a).mul_(kept).div_(1 - ctx.dropout)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        downs = (ctx.scale * down).split_with_sizes(joint.ranks, 1)
        count = len(joint.ranks)
        for_a, for_b = ctx.needs_input_grad[5 : 5 + count], ctx.needs_input_grad[5 + count :]
        da: Sequence[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        # For B the thin factor comes first: half the time of gᵀ down.
        if (parts := splitting()) is not None:
            for place, (u, d, g) in enumerate(zip(ups, downs, gs, strict=True)):
                if for_a[place]:
                    parts.add(ctx.factors[place], [one.t() @ other for one, other in parts.pairs(u, x)])
                if for_b[place]:
                    parts.add(ctx.factors[count + place], [(one.t() @ other).t() for one, other in parts.pairs(d, g)])
            return dx, None, None, None, None, *da, *db
        if any(for_a):
            da = (up.t() @ x).float().split_with_sizes(joint.ranks)
        for place, (d, g) in enumerate(zip(downs, gs, strict=True)):
            if for_b[place]:
                # Laid out as the factor: a gradient that is not is copied once more.
                db[place] = (d.t() @ g).t().to(torch.float32, memory_format=torch.contiguous_format)
        return dx, None, None, None, None, *da, *db
