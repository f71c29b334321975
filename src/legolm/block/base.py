"""The LLM on disk, and what a block's config says in place of the LLM's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from legolm.errors import LegolmError
from legolm.models import Shape, count_parameters, shape_of


@dataclass(frozen=True)
class Base:
    """The LLM on disk: what targets are counted in and blocks are cut from. `parameters` counts what is stored."""

    path: Path
    fingerprint: str
    config: Any
    shape: Shape
    parameters: int
    dtype: torch.dtype

    @staticmethod
    def of(path: Path, fingerprint: str, config: Any) -> Base:
        """The checkpoint in a folder. Raises `LegolmError` when its family is not known."""
        return Base(path, fingerprint, config, shape_of(config), count_parameters(path), config.dtype)

    def parameters_of(self, kept_weights: int) -> int:
        """Stored parameters of a block that keeps so many of the decoder's linear weights."""
        return self.parameters - (decoder_weights(self.shape) - kept_weights)


def decoder_weights(shape: Shape) -> int:
    """Linear weights in all decoder layers."""
    return shape.layers * shape.layer_weights


def config_changes(config: Any, small: Shape, layers: tuple[int, ...]) -> dict[str, Any]:
    """What a Hugging Face config must say of a block. Raises `LegolmError` when the family refuses the shape."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": small.layers,
        "num_key_value_heads": small.kv_groups,
        "num_attention_heads": small.kv_groups * small.queries_per_group,
        "head_dim": small.head_dim,
        "intermediate_size": small.neurons,
    }
    if getattr(config, "layer_types", None) is not None:
        sizes["layer_types"] = [config.layer_types[i] for i in layers]
    try:
        type(config)(**(config.to_dict() | sizes))
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise LegolmError(
            f"blocks: {config.model_type} does not take {small.kv_groups} KV groups "
            f"of {small.queries_per_group} heads ({reason}); choose another num_key_value_heads"
        ) from None
    return sizes
