"""How llama.cpp computes a model of each family: its architecture there, metadata, and the names and order of weights.

Families whose blocks it refuses or misreads under their own architecture are written as Llama where that computes the
same; what would be another function is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from legolm.errors import LegolmError
from legolm.models import Shape, shape_of

AS_LLAMA = ("llama", "mistral", "qwen2", "phi3")
"""Of these it is the same function. Their own architectures there refuse cut KV groups, or know other windows."""
OTHERS = {"qwen3": "qwen3", "gemma3_text": "gemma3", "olmo2": "olmo2", "gpt2": "gpt2", "gpt_neox": "gptneox"}
LAYER_NORMS = {"gpt2": "layer_norm_epsilon", "gptneox": "layer_norm_eps"}
"""Field of the config, of those whose norms subtract the mean and whose layers have biases."""
OWN_OUTPUT = ("olmo2", "gptneox")
"""These want the head in the file, also where it is the embeddings."""
ACTIVATIONS = {
    "gemma3": ("hidden_activation", ("gelu_pytorch_tanh",)),
    "gpt2": ("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu")),
    "gptneox": ("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh")),
}
"""Field of the config, and what llama.cpp takes for the same: of gelu the tanh form, whose error is below 0.001."""
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Layout:
    """What a GGUF file says of a model, beside its weights and tokenizer.

    `metadata` are keys after the architecture's name. `frequencies` (head_dim / 2) divide those of rotary positions.
    `query_gain` is what queries' norms are multiplied by. `notes` say what is other than in the checkpoint.
    """

    arch: str
    shape: Shape
    context: int
    metadata: dict[str, int | float]
    frequencies: Tensor | None = None
    query_gain: float = 1.0
    tied: bool = False
    notes: list[str] = field(default_factory=list)

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor as the file has them, of one as a checkpoint has it: split, in llama.cpp's order of rows."""
        for part, value in self._split(name, tensor):
            if self.arch == "llama" and ".self_attn.q_proj." in part:
                value = _paired(value, self.shape.kv_groups * self.shape.queries_per_group)
            elif self.arch == "llama" and ".self_attn.k_proj." in part:
                value = _paired(value, self.shape.kv_groups)
            elif self.arch == "gemma3" and part.endswith("norm.weight"):
                value = value.float() + 1  # its norms multiply by one more than the weight
                if part.endswith("q_norm.weight"):
                    value = value * self.query_gain
            elif self.arch == "gptneox" and ".query_key_value." in part:
                value = _apart(value, self.shape.kv_groups)
            renamed = self._renamed(part)
            yield renamed, value
            if self.arch in OWN_OUTPUT and self.tied and renamed == "token_embd.weight":
                yield "output.weight", value

    def _split(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for fused, parts in FUSED.items():
            if f".{fused}." not in name:
                continue
            spec = self.shape.module(fused)
            sizes = [self.shape.size(unit) for unit in spec.rows]
            room = fused.rpartition(".")[0]
            for part, value in zip(parts, torch.split(tensor, sizes), strict=True):
                yield name.replace(fused, f"{room}.{part}"), value
            return
        yield name, tensor

    def _renamed(self, name: str) -> str:
        import gguf

        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.arch)
        found = gguf.get_tensor_name_map(arch, self.shape.layers).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LegolmError(f"--to gguf: llama.cpp's {self.arch} has no place for {name}; export to hf or onnx")
        return str(found)


def layout_of(config: Any, name: str) -> Layout:
    """Of a checkpoint's config. Raises `LegolmError` for what llama.cpp would refuse or compute otherwise."""
    family, shape = config.model_type, shape_of(config)
    arch = "llama" if family in AS_LLAMA else OTHERS.get(family)
    if arch is None:
        raise LegolmError(
            f"{name}: family {family!r} cannot be written for llama.cpp (known: {', '.join([*AS_LLAMA, *OTHERS])}); hf "
            "and onnx can hold it"
        )
    metadata: dict[str, int | float] = {
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.neurons,
        "attention.head_count": shape.kv_groups * shape.queries_per_group,
        "attention.head_count_kv": shape.kv_groups,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "vocab_size": config.vocab_size,
    }
    if arch in LAYER_NORMS:
        metadata["attention.layer_norm_epsilon"] = float(getattr(config, LAYER_NORMS[arch]))
    else:
        metadata["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    _check_activation(config, arch, name)
    context, notes, gain = config.max_position_embeddings, [], 1.0
    if arch == "gpt2":
        _check_gpt2(config, name)
        return Layout(arch, shape, context, metadata | {"context_length": context}, tied=config.tie_word_embeddings)
    theta, local, frequencies, scale = _rotary(config, arch, name)
    metadata |= {"rope.dimension_count": shape.head_dim, "rope.freq_base": float(theta)}
    sliding = _sliding(config)
    if arch == "gptneox":
        metadata["rope.dimension_count"] = int(shape.head_dim * _turned(config))
        metadata["use_parallel_residual"] = bool(config.use_parallel_residual)
    elif arch == "gemma3":
        if scale != 1.0:
            metadata["rope.scaling.factor"] = scale
        gain = _gemma(config, shape, sliding, local, metadata, name)
    elif any(sliding) and config.sliding_window < context:
        context = config.sliding_window
        notes.append(
            f"context {context} of {config.max_position_embeddings}: beyond its window of {context} tokens llama.cpp's "
            f"{arch} computes another function"
        )
    if family in ("qwen2", "phi3"):
        notes.append(f"written as Llama, which computes the same; llama.cpp's {family} refuses cut heads")
    metadata["context_length"] = context
    return Layout(arch, shape, context, metadata, frequencies, gain, bool(config.tie_word_embeddings), notes)


def _rotary(config: Any, arch: str, name: str) -> tuple[float, float, Tensor | None, float]:
    """(base of the frequencies, that of sliding layers, what divides them, linear factor of the full layers)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    local = dict(rope.get("sliding_attention") or rope)
    rope = dict(rope.get("full_attention") or rope)
    kind = rope.get("rope_type", "default")
    if arch != "gptneox" and _turned(config) != 1.0:
        raise LegolmError(
            f"{name}: turns a part of each head only, which llama.cpp's {arch} does not; export to hf or onnx"
        )
    if kind == "default":
        return rope["rope_theta"], local["rope_theta"], None, 1.0
    if arch == "gemma3" and kind == "linear" and local.get("rope_type", "default") == "default":
        return rope["rope_theta"], local["rope_theta"], None, float(rope["factor"])
    if arch != "llama" or kind not in ("linear", "llama3"):
        raise LegolmError(f"{name}: its rope_type {kind!r} is not known for llama.cpp's {arch}; export to hf or onnx")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    half = torch.arange(0, shape_of(config).head_dim, 2, dtype=torch.float32) / shape_of(config).head_dim
    return rope["rope_theta"], local["rope_theta"], 1.0 / (rope["rope_theta"] ** half) / scaled, 1.0


def _turned(config: Any) -> float:
    """Share of a head's dimensions that positions turn."""
    rope = config.rope_parameters
    return float((rope.get("full_attention") or rope).get("partial_rotary_factor") or 1.0)


def _sliding(config: Any) -> list[bool]:
    """Of each layer, whether it looks back no further than the window."""
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return [False] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [True] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def _gemma(
    config: Any, shape: Shape, sliding: list[bool], local: float, metadata: dict[str, int | float], name: str
) -> float:
    """Add windows to the metadata; the gain of queries that makes llama.cpp's scale of attention this model's.

    Raises `LegolmError` for a pattern of layers that it has not: of a period only the last is full.
    """
    if getattr(config, "attn_logit_softcapping", None):
        raise LegolmError(f"{name}: caps its attention, which llama.cpp's gemma3 does not; export to hf or onnx")
    if cap := getattr(config, "final_logit_softcapping", None):
        metadata["final_logit_softcapping"] = float(cap)
    if any(sliding):
        periods = [0, *range(1, len(sliding) + 1)]
        fits = [p for p in periods if sliding == [p == 0 or i % p < p - 1 for i in range(len(sliding))]]
        if not fits:
            pattern = "".join("s" if one else "f" for one in sliding)
            raise LegolmError(
                f"{name}: its layers are {pattern} (sliding, full), and llama.cpp's gemma3 knows periods that end with "
                "a full one; cut whole periods of layers, or export to hf or onnx"
            )
        metadata["attention.sliding_window"] = config.sliding_window
        metadata["attention.sliding_window_pattern"] = fits[0]
        metadata["rope.freq_base_swa"] = float(local)
    heads = shape.kv_groups * shape.queries_per_group
    theirs = shape.hidden // heads if shape.layers == 62 else shape.head_dim  # it knows the 27B by its depth
    return float((theirs / config.query_pre_attn_scalar) ** 0.5)


def _check_activation(config: Any, arch: str, name: str) -> None:
    field_name, taken = ACTIVATIONS.get(arch, ("hidden_act", ("silu",)))
    found = getattr(config, field_name, None)
    if found not in taken:
        raise LegolmError(
            f"{name}: its activation is {found!r}, and llama.cpp's {arch} computes {taken[0]}; export to hf or onnx"
        )


def _check_gpt2(config: Any, name: str) -> None:
    """Raise `LegolmError` for another scale of attention than llama.cpp's."""
    for field_name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if bool(getattr(config, field_name, usual)) != usual:
            raise LegolmError(
                f"{name}: its {field_name} is {not usual}, and llama.cpp's gpt2 knows {usual}; export to hf or onnx"
            )


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows in the order of llama.cpp's Llama, which turns neighbours, where transformers turns a half and the other."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)


def _apart(tensor: Tensor, heads: int) -> Tensor:
    """All heads' queries, then keys, then values, of rows that have each head's three together."""
    return tensor.reshape(heads, 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
