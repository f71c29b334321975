"""From a block's target (sparsity or shape) to how many layers, KV groups and neurons it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from legolm.config import BlockConfig
from legolm.coverage import Coverage
from legolm.models import FAMILIES, Shape
from legolm.prune.registry import Pattern
from legolm.types import LegolmError

MULTIPLE = 8
"""Widths found from a sparsity are multiples of this: odd widths are slow everywhere."""


def target_shape(block: BlockConfig, shape: Shape) -> Shape:
    """The block's shape. Raises `LegolmError` for a target that cannot be met, naming the nearest that can."""
    if block.method != "structured":
        return shape
    wanted: dict[str, Any] = {
        "layers": block.num_hidden_layers or shape.layers,
        "kv_groups": block.num_key_value_heads or shape.kv_groups,
        "neurons": block.intermediate_size or shape.neurons,
    }
    names = {"layers": "num_hidden_layers", "kv_groups": "num_key_value_heads", "neurons": "intermediate_size"}
    for field, size in wanted.items():
        most = getattr(shape, field)
        if size > most:
            raise LegolmError(f"blocks: {block.name!r} wants {names[field]} {size}; the LLM has {most}")
        if size < most and field in FAMILIES[shape.family].fixed:
            raise LegolmError(
                f"blocks: {block.name!r} wants {names[field]} {size}; family {shape.family!r} keeps all {most}, "
                f"because {FAMILIES[shape.family].fixed[field]}"
            )
    if block.sparsity is not None:
        wanted["neurons"] = _width_for(block, block.sparsity, shape)
    return replace(shape, **wanted)


def target_pattern(block: BlockConfig, shape: Shape) -> Pattern:
    """What an unstructured or N:M block drops. Raises `LegolmError` when M does not divide a matrix's columns."""
    if block.pattern is None:
        assert block.sparsity is not None
        return Pattern(block.sparsity)
    kept, group = map(int, block.pattern.split(":"))
    for module in shape.modules:
        columns = shape.matrix(module)[1]
        if columns % group:
            raise LegolmError(
                f"blocks: {block.name!r} wants pattern {block.pattern}; {module} has {columns} columns, "
                f"which {group} does not divide; choose an M that does"
            )
    return Pattern(1 - kept / group, group)


def planned_coverage(block: BlockConfig, shape: Shape) -> Coverage:
    """Coverage of the right size before anything is cut (the first layers, groups and neurons): for plans only."""
    small = target_shape(block, shape)
    groups, neurons = tuple(range(small.kv_groups)), tuple(range(small.neurons))
    return Coverage(shape, tuple(range(small.layers)), (groups,) * small.layers, (neurons,) * small.layers)


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
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise LegolmError(
            f"blocks: {config.model_type} does not take {small.kv_groups} KV groups "
            f"of {small.queries_per_group} heads ({reason}); choose another num_key_value_heads"
        ) from None
    return sizes


def _width_for(block: BlockConfig, sparsity: float, shape: Shape) -> int:
    """MLP width that removes `sparsity` of the decoder's linear weights, to the nearest multiple of 8."""
    per_neuron = sum((*spec.rows, spec.cols).count("neuron") for spec in shape.modules.values()) * shape.hidden
    width = shape.neurons - sparsity * shape.layer_weights / per_neuron
    rounded = round(width / MULTIPLE) * MULTIPLE
    if rounded < MULTIPLE:
        most = (shape.neurons - MULTIPLE) * per_neuron / shape.layer_weights
        raise LegolmError(
            f"blocks: {block.name!r} wants sparsity {sparsity}; the MLP alone gives at most {most:.3f}; "
            "give num_hidden_layers, num_key_value_heads and intermediate_size instead"
        )
    return min(rounded, shape.neurons)
