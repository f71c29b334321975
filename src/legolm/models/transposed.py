"""GPT-2's linear layers: stored as (in, out), and here an `nn.Linear` like any other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Linear):
    """A `Conv1D` as a linear layer: weight (out, in) in memory, (in, out) in every state dict."""

    @staticmethod
    def of(module: Conv1D) -> TransposedLinear:
        """With the weights of a `Conv1D`; on its device."""
        rows = module.weight.shape[1]
        made = TransposedLinear(1, 1, device="meta")
        made.in_features, made.out_features = len(module.weight), rows
        made.weight = nn.Parameter(module.weight.data.T.contiguous(), module.weight.requires_grad)
        made.bias = module.bias
        return made.train(module.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        turned = {name: state_dict[name].T.contiguous()} if name in state_dict else {}
        super()._load_from_state_dict({**state_dict, **turned}, prefix, *args)  # type: ignore[no-untyped-call]


def as_linears(layers: nn.ModuleList) -> None:
    """Put linear layers in the place of each `Conv1D` of decoder layers."""
    for name, module in list(layers.named_modules()):
        if isinstance(module, Conv1D):
            layers.set_submodule(name, TransposedLinear.of(module))
