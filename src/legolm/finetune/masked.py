"""The masked forward of an unstructured block: y = x (M ∘ (W + s·B·A))ᵀ.

What is trained is then what a merge under the mask gives (SparsePEFT, Munoz et al., arXiv 2410.03750; LoRS, Hu et al.,
arXiv 2501.08582). A plain adapter trains the unmasked product, and its merge is another function. As in LoRS the dense
product is recomputed in the backward pass instead of stored, so that memory stays that of plain LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from legolm.adapter import masked_, merged_weight
from legolm.finetune.per_example import splitting


class MaskedLinear(torch.autograd.Function):
    """Saves x (…, in), A (r, in) and B (out, r); W (out, in) and M are frozen. Products in W's dtype."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        mask: Tensor,
        scale: float,
        seed: int,
    ) -> Tensor:
        low = x.to(weight.dtype)
        ctx.save_for_backward(low, weight, a, b, mask)
        ctx.scale, ctx.seed, ctx.dtype, ctx.factors = scale, seed, x.dtype, (id(a), id(b))
        return linear(low, merged_weight(weight, a, b, scale, mask, seed), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, mask = ctx.saved_tensors
        g = grad.to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ merged_weight(weight, a, b, ctx.scale, mask, ctx.seed)).to(ctx.dtype)
        if (parts := splitting()) is not None:
            tokens = parts.pairs(g.flatten(0, -2), x.flatten(0, -2))
            products = [masked_((one.t() @ two).float(), mask) for one, two in tokens]
            if ctx.needs_input_grad[3]:
                parts.add(ctx.factors[0], [ctx.scale * (b.t() @ one) for one in products])
            if ctx.needs_input_grad[4]:
                parts.add(ctx.factors[1], [ctx.scale * (one @ a.t()) for one in products])
            return dx, None, None, None, None, None, None, None
        dense = masked_((g.flatten(0, -2).t() @ x.flatten(0, -2)).float(), mask)
        da = ctx.scale * (b.t() @ dense) if ctx.needs_input_grad[3] else None
        db = ctx.scale * (dense @ a.t()) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None, None, None
