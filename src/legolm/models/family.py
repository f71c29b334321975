"""Where layers, heads and MLPs live in each model family, as data.

A family is one line in `FAMILIES`. Today's families share one layout, so one table of modules serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from legolm.types import LegolmError

Unit = Literal["hidden", "query", "key", "neuron"]
"""What a row or column of a matrix belongs to. `hidden` is never cut; query and key are cut by KV group."""


@dataclass(frozen=True)
class Module:
    """One linear layer of a decoder layer: what its rows (outputs) and columns (inputs) are."""

    rows: Unit
    cols: Unit


MODULES: dict[str, Module] = {
    "self_attn.q_proj": Module("query", "hidden"),
    "self_attn.k_proj": Module("key", "hidden"),
    "self_attn.v_proj": Module("key", "hidden"),
    "self_attn.o_proj": Module("hidden", "query"),
    "mlp.gate_proj": Module("neuron", "hidden"),
    "mlp.up_proj": Module("neuron", "hidden"),
    "mlp.down_proj": Module("hidden", "neuron"),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = "model.layers"
MIDDLE = "post_attention_layernorm"
"""Within a layer: the module that reads the hidden states between attention and MLP."""


@dataclass(frozen=True)
class Shape:
    """The sizes that coverage counts in. A KV group is one key-value head with its query heads."""

    layers: int
    hidden: int
    neurons: int
    kv_groups: int
    queries_per_group: int
    head_dim: int

    def per_group(self, unit: Unit) -> int:
        """Rows (or columns) of one KV group in a module cut by `unit`."""
        return self.head_dim * (self.queries_per_group if unit == "query" else 1)

    def size(self, unit: Unit) -> int:
        """Rows (or columns) in all."""
        if unit == "hidden":
            return self.hidden
        return self.neurons if unit == "neuron" else self.kv_groups * self.per_group(unit)

    def matrix(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a module's weight."""
        spec = MODULES[module]
        return self.size(spec.rows), self.size(spec.cols)

    @property
    def layer_weights(self) -> int:
        """Linear weights in one decoder layer."""
        return sum(rows * cols for rows, cols in map(self.matrix, MODULES))


def shape_of(config: Any) -> Shape:
    """Sizes of a Hugging Face model config. Raises `LegolmError` for an unknown family or a quantized model."""
    architectures = config.architectures or []
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise LegolmError(
            f"model: {', '.join(architectures) or config.model_type} is not a causal LM; give one that is"
        )
    if config.model_type not in FAMILIES:
        raise LegolmError(f"model: family {config.model_type!r} is not known; known: {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise LegolmError("model: its weights are quantized; give the full-precision checkpoint")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        neurons=config.intermediate_size,
        kv_groups=groups,
        queries_per_group=heads // groups,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, in order."""
    layers = model.get_submodule(LAYERS)
    assert isinstance(layers, nn.ModuleList)
    return layers
