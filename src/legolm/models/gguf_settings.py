"""What a GGUF file says of a model beyond what transformers reads there, as llama.cpp takes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Settings = Mapping[str, Any]
"""Values by their keys behind the architecture's name."""
NOTHING = {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
"""Keys that change nothing of models whose positions are not scaled, or linearly."""
SCALING = ("none", "linear")
LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the model of each Gemma whose scale of attention is another one: llama.cpp knows it by them."""
WINDOWED = (*LARGEST, "mistral", "phi3")
BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}


def settle(told: Settings, read: Collection[str], tensors: Collection[str], config: Any) -> list[str]:
    """Set what transformers passed over when it made a config of a file; the keys that have no place in it.

    `read` are the keys that it knows, and `tensors` the file's. What is not told is as llama.cpp takes it then.
    """
    heads = config.num_attention_heads
    head = told.get("attention.key_length", config.hidden_size // heads)
    if hasattr(config, "head_dim") or head != config.hidden_size // heads:
        config.head_dim = head
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = told.get("attention.head_count_kv", heads)
    for field, tensor in BIASES.items():
        if hasattr(config, field):
            setattr(config, field, tensor in tensors)
    known = {*read, *NOTHING, "attention.key_length"}
    implied = {
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "attention.value_length": head,
        "attention.causal": True,
        "vocab_size": config.vocab_size,
        "expert_count": 0,
        "expert_used_count": 0,
    }
    if hasattr(config, "use_parallel_residual"):
        implied["use_parallel_residual"] = config.use_parallel_residual
    if config.model_type == "gpt2":
        config.n_positions, config.n_inner = told["context_length"], told["feed_forward_length"]
    if getattr(config, "rope_parameters", None):
        known |= {"rope.freq_base", "rope.scaling.factor", "rope.scale_linear"}
        implied |= {"rope.dimension_count": _turned(config, head), "rope.scaling.attn_factor": 1.0}
        if told.get("rope.scaling.type") in SCALING:
            known.add("rope.scaling.type")
        implied |= _rotary(told, config)
    window = told.get("attention.sliding_window", 4096 if config.model_type == "gemma2" else 0)
    if config.model_type in WINDOWED:
        known.add("attention.sliding_window")
        config.sliding_window = window or None
    if config.model_type in LARGEST:
        known |= _gemma(told, head, window, config)
    return [key for key in told if (implied[key] != told[key] if key in implied else key not in known)]


def _turned(config: Any, head: int) -> int:
    """How many of a head's dimensions positions turn."""
    return int(head * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def _rotary(told: Settings, config: Any) -> Settings:
    """Set bases and linear scaling; the base of sliding layers where the config has none of its own."""
    base, rope = told.get("rope.freq_base", 1e4), config.rope_parameters
    scale = told.get("rope.scaling.factor", told.get("rope.scale_linear")) or 1.0
    full = {"rope_type": "default", "rope_theta": base}
    if scale != 1.0 and told.get("rope.scaling.type") != "none":
        full |= {"rope_type": "linear", "factor": scale}
    if "full_attention" not in rope:
        config.rope_parameters = rope | full
        return {"rope.freq_base_swa": base}
    local = told.get("rope.freq_base_swa", 1e4)
    config.rope_parameters = {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {"rope.freq_base_swa": local}


def _gemma(told: Settings, head: int, window: int, config: Any) -> set[str]:
    """Set Gemma's windows, caps and scale of attention; the keys that this read."""
    config.sliding_window = window or 4096  # it wants one also where no layer has it
    keys, second = {"final_logit_softcapping"}, config.model_type == "gemma2"
    config.final_logit_softcapping = told.get("final_logit_softcapping", 30.0 if second else 0.0) or None
    if second:
        keys.add("attn_logit_softcapping")
        config.attn_logit_softcapping = told.get("attn_logit_softcapping", 50.0) or None
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    config.query_pre_attn_scalar = config.hidden_size // heads if layers == LARGEST[config.model_type] else head
    period = told.get("attention.sliding_window_pattern", 2 if second else 6)
    if type(period) is int and period >= 0:
        keys.add("attention.sliding_window_pattern")
        slides = [window and (not period or at % period < period - 1) for at in range(layers)]
        config.layer_types = ["sliding_attention" if one else "full_attention" for one in slides]
    return keys
