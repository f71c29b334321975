"""Where layers, heads and MLPs live in each model family, as data: a family is one entry of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from legolm.errors import LegolmError, brief

Unit = Literal["hidden", "query", "key", "qkv", "neuron"]
"""What rows or columns of a matrix belong to. `hidden` is never cut; query, key (and value) by KV group.

`qkv` is a KV group's queries, keys and values side by side.
"""


@dataclass(frozen=True)
class Module:
    """One linear layer of a decoder layer: what its rows (outputs) and columns (inputs) are.

    A fused matrix has several units along its rows, one whole unit after the other. `norm` is the module between this
    one's output and the sum with the residual stream, where the family has one.
    """

    rows: tuple[Unit, ...]
    cols: Unit
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture: its linear layers by path within a decoder layer, and where the rest is.

    `layers` is the path of the decoder layers in the causal LM. `fixed` says of a field of `Shape` that structured
    pruning must leave it alone, and why.
    """

    modules: Mapping[str, Module]
    layers: str = "model.layers"
    fixed: Mapping[str, str] = field(default_factory=dict)


_HIDDEN: tuple[Unit, ...] = ("hidden",)


def _separate(attention_norm: str | None = None, mlp_norm: str | None = None) -> dict[str, Module]:
    """Llama's layout: q, k, v and gate, up by themselves; with the norms between each part and the residual stream."""
    return {
        "self_attn.q_proj": Module(("query",), "hidden"),
        "self_attn.k_proj": Module(("key",), "hidden"),
        "self_attn.v_proj": Module(("key",), "hidden"),
        "self_attn.o_proj": Module(_HIDDEN, "query", attention_norm),
        "mlp.gate_proj": Module(("neuron",), "hidden"),
        "mlp.up_proj": Module(("neuron",), "hidden"),
        "mlp.down_proj": Module(_HIDDEN, "neuron", mlp_norm),
    }


_LLAMA = Family(_separate())
_POST_NORMS = _separate("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": Family(_POST_NORMS),
    "olmo2": Family(
        _POST_NORMS,
        fixed={"kv_groups": "its queries and keys are normalised over all heads together"},
    ),
    "phi3": Family(
        {
            "self_attn.qkv_proj": Module(("query", "key", "key"), "hidden"),
            "self_attn.o_proj": Module(_HIDDEN, "query"),
            "mlp.gate_up_proj": Module(("neuron", "neuron"), "hidden"),
            "mlp.down_proj": Module(_HIDDEN, "neuron"),
        }
    ),
    "gpt_neox": Family(
        {
            "attention.query_key_value": Module(("qkv",), "hidden"),
            "attention.dense": Module(_HIDDEN, "query"),
            "mlp.dense_h_to_4h": Module(("neuron",), "hidden"),
            "mlp.dense_4h_to_h": Module(_HIDDEN, "neuron"),
        },
        layers="gpt_neox.layers",
        fixed={"kv_groups": "its heads must fill the hidden size"},
    ),
}
"""By `model_type` of the Hugging Face config."""


@dataclass(frozen=True)
class Shape:
    """A family and the sizes that coverage counts in. A KV group is one key-value head with its query heads."""

    family: str
    layers: int
    hidden: int
    neurons: int
    kv_groups: int
    queries_per_group: int
    head_dim: int

    def __post_init__(self) -> None:
        known_family(self.family)

    @property
    def modules(self) -> Mapping[str, Module]:
        """The linear layers of a decoder layer, in the family's order."""
        return FAMILIES[self.family].modules

    def module(self, name: str) -> Module:
        """One of `modules`. Raises `LegolmError` for a name that the family does not have."""
        if name not in self.modules:
            known = ", ".join(self.modules)
            raise LegolmError(f"module {name!r}: family {self.family!r} has no such linear layer; known: {known}")
        return self.modules[name]

    def reader(self, unit: Unit) -> str:
        """The linear layer whose columns are `unit`: for `query` and `neuron` the one that ends attention or MLP."""
        return next(name for name, module in self.modules.items() if module.cols == unit)

    def per_group(self, unit: Unit) -> int:
        """Rows (or columns) of one KV group in a module cut by `unit`; of one neuron, 1."""
        if unit == "neuron":
            return 1
        return self.head_dim * {"query": self.queries_per_group, "qkv": self.queries_per_group + 2}.get(unit, 1)

    def size(self, unit: Unit) -> int:
        """Rows (or columns) in all."""
        if unit == "hidden":
            return self.hidden
        return self.neurons if unit == "neuron" else self.kv_groups * self.per_group(unit)

    def matrix(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a module's weight."""
        spec = self.module(module)
        return sum(map(self.size, spec.rows)), self.size(spec.cols)

    @property
    def layer_weights(self) -> int:
        """Linear weights in one decoder layer."""
        return sum(rows * cols for rows, cols in map(self.matrix, self.modules))


def shape_of(config: Any) -> Shape:
    """Sizes of a Hugging Face model config. Raises `LegolmError` for an unknown family or a quantized model."""
    architectures = config.architectures or []
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise LegolmError(
            f"model: {', '.join(architectures) or config.model_type} is not a causal LM; give one that is"
        )
    family_of(config)
    for name in ("quantization_config", "compression_config"):
        if (found := getattr(config, name, None)) is not None:
            raise quantized_error(found.get("quant_method", "") if isinstance(found, dict) else "")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise LegolmError(
            f"model: config.json has {heads} num_attention_heads, which its {groups} num_key_value_heads do not "
            "divide; mend it"
        )
    return Shape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        neurons=config.intermediate_size,
        kv_groups=groups,
        queries_per_group=heads // groups,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def quantized_error(method: str) -> LegolmError:
    """What is said of a quantized model, and the way out."""
    return LegolmError(
        f"model: its weights are quantized{method and f' ({brief(str(method))})'}; run: legolm import MODEL --out DIR, "
        "and give DIR in its place"
    )


def family_of(config: Any) -> Family:
    """The family of a Hugging Face model config. Raises `LegolmError` for an unknown one."""
    if getattr(config, "text_config", None) is not None:
        raise LegolmError(f"model: {config.model_type!r} is more than a text model; give a text-only checkpoint")
    return known_family(config.model_type)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, in order."""
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def known_family(family: str) -> Family:
    """The family of this `model_type`. Raises `LegolmError` for an unknown one."""
    if family not in FAMILIES:
        raise LegolmError(
            f"model: family {brief(family)!r} is not known; known: {', '.join(FAMILIES)}; "
            "to add one, say where its linear layers are in FAMILIES (legolm/models/family.py)"
        )
    return FAMILIES[family]
