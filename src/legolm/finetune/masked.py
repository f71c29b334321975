"""The masked forward of an unstructured block: y = x (M ∘ (W + s·B·A))ᵀ.

What is trained is then what a merge under the mask gives (SparsePEFT, Munoz et al., arXiv 2410.03750; LoRS, Hu et al.,
arXiv 2501.08582). A plain adapter trains the unmasked product, and its merge is another function. As in LoRS the dense
product is recomputed in the backward pass instead of stored, so that memory stays that of plain LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class _MaskedLinear(torch.autograd.Function):
    """Saves x (…, in), A (r, in) and B (out, r); W (out, in) and M are frozen."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, mask: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, a, b, weight, mask)
        ctx.scale = scale
        return linear(x, merged_weight(weight, a, b, scale, mask))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, b, weight, mask = ctx.saved_tensors
        dx = grad @ merged_weight(weight, a, b, ctx.scale, mask) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2)
        dense = (flat.T @ x.flatten(0, -2).to(flat.dtype)).float() * mask
        return dx, ctx.scale * (b.T @ dense), ctx.scale * (dense @ a.T), None, None, None


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """M ∘ (W + s·B·A) in float32, whatever the autocast and the dtype of W; without a mask W + s·B·A."""
    with torch.autocast("cpu", enabled=False):
        merged = torch.addmm(weight.float(), b, a, alpha=scale)
        return merged if mask is None else merged.mul_(mask)


def mask_forward(adapted: Any, mask: Tensor) -> None:
    """Give a PEFT LoRA layer (adapter `default`) the masked forward."""
    base: nn.Linear = adapted.base_layer
    a, b, scale = adapted.lora_A["default"], adapted.lora_B["default"], adapted.scaling["default"]

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _MaskedLinear.apply(x, a.weight, b.weight, base.weight, mask, scale)  # type: ignore[no-untyped-call]
        return y if base.bias is None else y + base.bias

    adapted.forward = forward
