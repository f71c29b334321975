"""Rotary positions whose frequencies follow the length of the sequence: LongRoPE, dynamic NTK.

transformers takes the length of the longest sequence of a pass, and of earlier passes too. Here each sequence has the
frequencies of its own length, in a pack, in a padded batch, and whatever ran before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def scales_by_length(model: Any) -> bool:
    """Whether a sequence's rotary frequencies depend on its length."""
    return any(_scaled(module) for module in model.modules())


def by_own_length(model: Any) -> None:
    """Let each sequence have the frequencies of its own length. A position 0 begins one."""
    for module in model.modules():
        if _scaled(module):
            module.forward = _ByOwnLength(module)


def _scaled(module: nn.Module) -> bool:
    kinds = vars(module).get("rope_type")  # asked of every module in each step: a miss of getattr is slow there
    return any(
        "dynamic" in kind or kind == "longrope"
        for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
        if kind
    )


class _ByOwnLength:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (batch, tokens, size), for positions (batch, tokens) int64."""
        rows = []
        for row in position_ids:
            starts = row.eq(0).nonzero()[:, 0].tolist()
            alone = [self._alone(x, part[None], layer_type) for part in row.tensor_split(starts) if len(part)]
            rows.append([torch.cat(side, 1) for side in zip(*alone, strict=True)])
        cos, sin = (torch.cat(side) for side in zip(*rows, strict=True))
        return cos, sin

    def _alone(self, x: Tensor, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
        module: Any = self._module
        prefix = "" if layer_type is None else f"{layer_type}_"
        # As at the start: dynamic NTK keeps what the longest sequence so far had.
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(x.device, copy=True))
        setattr(
            module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", module.max_seq_len_cached)
        )
        kind = {} if layer_type is None else {"layer_type": layer_type}
        cos, sin = type(module).forward(module, x, positions, **kind)
        return cos, sin
