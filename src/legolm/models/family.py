"""Where layers, heads and MLPs live in each model family, as data: an entry for each that is not Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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

    A fused matrix has several units along its rows, one whole unit after the other.
    """

    rows: tuple[Unit, ...]
    cols: Unit


@dataclass(frozen=True)
class Family:
    """One architecture: its linear layers by path within a decoder layer, and where the rest is.

    `layers` is the path of the decoder layers in the causal LM, `neurons` the config's field of the MLP's width, where
    none is said four times the hidden size. `transposed`: the weights are `Conv1D`'s, (in, out), on disk and in
    transformers' model; ours have `nn.Linear` in their place.
    """

    modules: Mapping[str, Module]
    layers: str = "model.layers"
    neurons: str = "intermediate_size"
    transposed: bool = False


_HIDDEN: tuple[Unit, ...] = ("hidden",)
_ATTENTION = {
    "self_attn.q_proj": Module(("query",), "hidden"),
    "self_attn.k_proj": Module(("key",), "hidden"),
    "self_attn.v_proj": Module(("key",), "hidden"),
}

LLAMA = Family(
    {
        **_ATTENTION,
        "self_attn.o_proj": Module(_HIDDEN, "query"),
        "mlp.gate_proj": Module(("neuron",), "hidden"),
        "mlp.up_proj": Module(("neuron",), "hidden"),
        "mlp.down_proj": Module(_HIDDEN, "neuron"),
    }
)
"""What a decoder without an entry must be (`layout_of` proves it)."""
ONLY_DENSE = "only dense decoders whose linear layers are Llama's or have an entry in legolm/models/family.py work"

FAMILIES: dict[str, Family] = {
    "phi3": Family(
        {
            "self_attn.qkv_proj": Module(("query", "key", "key"), "hidden"),
            "self_attn.o_proj": Module(_HIDDEN, "query"),
            "mlp.gate_up_proj": Module(("neuron", "neuron"), "hidden"),
            "mlp.down_proj": Module(_HIDDEN, "neuron"),
        }
    ),
    "starcoder2": Family(
        {
            **_ATTENTION,
            "self_attn.o_proj": Module(_HIDDEN, "query"),
            "mlp.c_fc": Module(("neuron",), "hidden"),
            "mlp.c_proj": Module(_HIDDEN, "neuron"),
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
    ),
    "gpt2": Family(
        {
            "attn.c_attn": Module(("query", "key", "key"), "hidden"),
            "attn.c_proj": Module(_HIDDEN, "query"),
            "mlp.c_fc": Module(("neuron",), "hidden"),
            "mlp.c_proj": Module(_HIDDEN, "neuron"),
        },
        layers="transformer.h",
        neurons="n_inner",
        transposed=True,
    ),
    "opt": Family(
        {
            **_ATTENTION,
            "self_attn.out_proj": Module(_HIDDEN, "query"),
            "fc1": Module(("neuron",), "hidden"),
            "fc2": Module(_HIDDEN, "neuron"),
        },
        layers="model.decoder.layers",
        neurons="ffn_dim",
    ),
}
"""By `model_type` of the Hugging Face config: those whose linear layers are not Llama's."""


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

    @cached_property
    def entry(self) -> Family:
        """Where its linear layers are."""
        return known_family(self.family)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """The linear layers of a decoder layer, in the family's order."""
        return self.entry.modules

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


def check_kind(config: Any) -> None:
    """Raise `LegolmError` for what is no causal LM of a known family, and for a quantized one."""
    family_of(config)
    architectures = config.architectures or []
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise LegolmError(
            f"model: {', '.join(architectures) or config.model_type} is not a causal LM; give one that is"
        )
    for name in ("quantization_config", "compression_config"):
        if (found := getattr(config, name, None)) is not None:
            raise quantized_error(found.get("quant_method", "") if isinstance(found, dict) else "")
    heads, groups = (_field(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is int and type(groups) is int and heads % groups:
        raise LegolmError(
            f"model: config.json has {heads} num_attention_heads, which its {groups} num_key_value_heads do not "
            "divide; mend it"
        )


def shape_of(config: Any) -> Shape:
    """Sizes of a Hugging Face model config.

    Raises `LegolmError` for what `check_kind` refuses, and for a family that lacks one of the sizes.
    """
    check_kind(config)
    family = family_of(config)
    heads, hidden, layers = (_size(config, f) for f in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    groups = _field(config, "num_key_value_heads") or heads
    return Shape(
        family=config.model_type,
        layers=layers,
        hidden=hidden,
        neurons=4 * hidden if getattr(config, family.neurons, 0) is None else _size(config, family.neurons),
        kv_groups=groups,
        queries_per_group=heads // groups,
        head_dim=_field(config, "head_dim") or hidden // heads,
    )


def _field(config: Any, name: str) -> Any:
    """A value of the config; None where it has none, or one a layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # as transformers' configs with values a layer say it
        return None


def _size(config: Any, field: str) -> int:
    size = _field(config, field)
    if type(size) is not int or size < 1:
        raise LegolmError(
            f"model: family {config.model_type!r} has {brief(repr(size))} as {field}, and Llama's layers have one "
            f"number there; {ONLY_DENSE}"
        )
    return size


def quantized_error(method: str) -> LegolmError:
    """What is said of a quantized model, and the way out."""
    return LegolmError(
        f"model: its weights are quantized{method and f' ({brief(str(method))})'}; run: legolm import MODEL --out DIR, "
        "and give DIR in its place"
    )


def family_of(config: Any) -> Family:
    """The family of a Hugging Face model config. Raises `LegolmError` for an unknown one."""
    if getattr(config, "text_config", None) is not None:
        raise LegolmError(
            f"model: {config.model_type!r} is more than a text model; give a text-only checkpoint: "
            "run: legolm import MODEL --out DIR, and give DIR"
        )
    return known_family(config.model_type)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, in order."""
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def known_family(family: str) -> Family:
    """The family of this `model_type`. Raises `LegolmError` for one that transformers has no causal LM for."""
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LegolmError(f"model: family {brief(family)!r} is not known to this transformers as a causal LM")
    return FAMILIES.get(family, LLAMA)
