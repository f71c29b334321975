"""What a cut does to a decoder layer in memory, and to the config beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from legolm.errors import LegolmError
from legolm.models.family import Shape, family_of


def config_changes(config: Any, small: Shape, layers: Sequence[int]) -> dict[str, Any]:
    """What a Hugging Face config must say of a block that keeps these layers, ascending.

    Raises `LegolmError` when the family refuses the shape.
    """
    sizes = sizes_in(config, small, layers)
    try:
        type(config)(**(config.to_dict() | sizes))
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise LegolmError(
            f"blocks: {config.model_type} does not take {small.kv_groups} KV groups "
            f"of {small.queries_per_group} heads ({reason}); choose another num_key_value_heads"
        ) from None
    return sizes


def sizes_in(config: Any, small: Shape, layers: Sequence[int]) -> dict[str, Any]:
    """The same, whether or not the family takes it. Lists with an entry a layer keep those of the kept layers."""
    count = config.num_hidden_layers
    lists = {
        name: [value[i] for i in layers]
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) >= count
    }
    return lists | {
        "num_hidden_layers": small.layers,
        "num_key_value_heads": small.kv_groups,
        "num_attention_heads": small.kv_groups * small.queries_per_group,
        "head_dim": small.head_dim,
        family_of(config).neurons: small.neurons,
    }


def narrow(module: nn.Linear, weight: Tensor, rows: Tensor | None) -> None:
    """Give a layer the part of its weight that stays, and its bias these output rows (None: all)."""
    if rows is not None and module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[rows].clone(), requires_grad=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.out_features, module.in_features = weight.shape


def tell(layer: nn.Module, changes: Mapping[str, Any]) -> None:
    """Tell a copied layer the cut model's sizes: Phi-3's attention splits its fused matrix by them when it runs."""
    for module in layer.modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config.update(changes)  # type: ignore[union-attr, operator]
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = changes["num_key_value_heads"]
