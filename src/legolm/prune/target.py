"""From a block's target to how many layers, KV groups and neurons it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from legolm.block import Base, Coverage, decoder_weights
from legolm.config import BlockConfig
from legolm.errors import LegolmError
from legolm.models import Shape, config_changes, layout_of
from legolm.prune.registry import Pattern

STEPS, CHOICE = (64, 32, 16, 8), 16
"""Steps between the widths that a budget may find, and the least number of widths that a step must leave."""
NEAR = 0.005
"""A sparsity that is missed by no more counts as met."""
FIELDS = {"layers": "num_hidden_layers", "kv_groups": "num_key_value_heads", "neurons": "intermediate_size"}
"""The field of a Hugging Face config, and of a `BlockConfig`, for each size of a `Shape` that can be cut."""


def step_of(shape: Shape) -> int:
    """What the widths found from a budget are multiples of: 64 from 1,024 neurons on, 32 from 512, 16 from 256, else 8.

    In bfloat16 odd multiples of 8 cost 13 to 18 % of the speed on one machine, of 16 5 to 11 %, of 32 4 %, and next to
    nothing on another (docs/pruning.md); llama.cpp quantizes only rows whose length is a multiple of 32. A narrow MLP
    takes a smaller step, so that a budget still has a choice.
    """
    return next((step for step in STEPS if shape.neurons >= CHOICE * step), STEPS[-1])


def smallest(base: Base) -> Shape:
    """What the model leaves at least, and a budget can find."""
    shape = base.shape
    least = {"layers": 1, "kv_groups": 1, "neurons": min(step_of(shape), shape.neurons)}
    fixed = layout_of(base.config).fixed
    return replace(shape, **{size: count for size, count in least.items() if size not in fixed})  # type: ignore[arg-type]


def given_shape(block: BlockConfig, base: Base) -> Shape | None:
    """The shape that the block names itself; None when it names a budget. Raises `LegolmError` when it cannot be."""
    sizes = {size: getattr(block, field) for size, field in FIELDS.items()}
    if block.method == "structured" and not any(sizes.values()):
        return None
    wanted = {size: asked or getattr(base.shape, size) for size, asked in sizes.items()}
    for size, count in wanted.items():
        most = getattr(base.shape, size)
        if count > most:
            raise LegolmError(f"blocks: {block.name!r} wants {FIELDS[size]} {count}; the LLM has {most}")
        reason = layout_of(base.config).fixed.get(size)
        if count < most and reason:
            raise LegolmError(
                f"blocks: {block.name!r} wants {FIELDS[size]} {count}; family {base.shape.family!r} keeps all {most}, "
                f"because {reason}"
            )
    small = replace(base.shape, **wanted)
    config_changes(base.config, small, tuple(range(small.layers)))
    return small


def shapes_within(block: BlockConfig, base: Base, kept: Callable[[int], float] | None = None) -> list[Shape]:
    """Shapes that meet the block's budget, those that cut fewest kinds of units first.

    `kept` gives instead the decoder's weights that are left at a number of layers.

    Each number of layers and KV groups comes with the width that fills the budget: the nearest for a sparsity, the
    largest for a ceiling. Widths are multiples of `step_of`, or the LLM's own. Raises `LegolmError` when there is none,
    naming the nearest target that can be met.
    """
    same = 0.0 if kept else _kept_weights(block, base)
    shape, fixed = base.shape, layout_of(base.config).fixed
    per_neuron = sum((*spec.rows, spec.cols).count("neuron") for spec in shape.modules.values()) * shape.hidden
    step = step_of(shape)
    widths = [shape.neurons] if "neurons" in fixed else [*range(step, shape.neurons, step), shape.neurons]
    found, misses, roomy = [], [], []
    heads = [n for n in _counts(shape, "kv_groups", fixed) if _is_taken(base, replace(shape, kv_groups=n))]
    for layers, groups in product(_counts(shape, "layers", fixed), heads):
        rest = replace(shape, layers=layers, kv_groups=groups, neurons=0)
        wanted = ((kept(layers) if kept else same) / layers - rest.layer_weights) / per_neuron
        if block.sparsity is not None:
            width, room = min(widths, key=lambda one: abs(one - wanted)), step / 2
        else:
            width, room = max((one for one in widths if one <= wanted), default=0), step
        if width and abs(wanted - width) <= room:
            found.append(replace(rest, neurons=width))
            misses.append(abs(wanted - width) * per_neuron * layers / decoder_weights(shape))
        elif width and kept:
            roomy.append(replace(rest, neurons=width))
    # A deeper or wider shape beats one with room to spare, unless the calls of one more layer take more than the room.
    found = found or roomy[:1]
    if not found:
        raise _out_of_reach(block, base)
    if block.sparsity is None:
        return found
    # Steps are wide: of shapes that miss by more, those that keep too much would win.
    return [found[0], *(small for small, miss in zip(found[1:], misses[1:], strict=True) if miss <= NEAR)]


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


def window_coverage(block: BlockConfig, base: Base) -> Coverage:
    """What a window keeps: in each of its layers the units from `offset` on, at the end on from the front.

    Raises `LegolmError` for a layer that the LLM does not have, and for a shape that cannot be.
    """
    shape = base.shape
    layers = tuple(range(shape.layers)) if block.layers is None else block.layers
    if layers[-1] >= shape.layers:
        raise LegolmError(f"blocks: {block.name!r} wants layer {layers[-1]}; the LLM has 0 to {shape.layers - 1}")
    small = given_shape(block.model_copy(update={"num_hidden_layers": len(layers)}), base)
    assert small is not None

    def units(count: int, most: int) -> tuple[int, ...]:
        return tuple(sorted(((block.offset or 0) + place) % most for place in range(count)))

    groups, neurons = units(small.kv_groups, shape.kv_groups), units(small.neurons, shape.neurons)
    return Coverage(shape, layers, (groups,) * len(layers), (neurons,) * len(layers))


def planned_coverage(block: BlockConfig, base: Base) -> Coverage:
    """Coverage before anything is cut: for plans only. A window's is exact; of the others the size is about right, and
    it is of the first layers, groups and neurons."""
    if block.method == "window":
        return window_coverage(block, base)
    small = base.shape
    if block.method == "structured":
        # What a speed-up takes is measured when the block is cut; here, weights stand for time.
        share = decoder_weights(base.shape) / (block.speedup or 1)
        kept = (lambda layers: share) if block.speedup else None
        small = given_shape(block, base) or shapes_within(block, base, kept)[0]
    groups, neurons = tuple(range(small.kv_groups)), tuple(range(small.neurons))
    return Coverage(base.shape, tuple(range(small.layers)), (groups,) * small.layers, (neurons,) * small.layers)


def _kept_weights(block: BlockConfig, base: Base) -> float:
    """Linear weights of the decoder that the block's budget leaves."""
    whole = decoder_weights(base.shape)
    if block.sparsity is not None:
        return (1 - block.sparsity) * whole
    parameters = block.params if block.params is not None else (block.memory or 0) // base.dtype.itemsize
    return whole - (base.parameters - parameters)


def _counts(shape: Shape, size: str, fixed: Any) -> list[int]:
    """Numbers of layers or KV groups to consider, most first."""
    most = getattr(shape, size)
    return [most] if size in fixed else list(range(most, 0, -1))


def _is_taken(base: Base, small: Shape) -> bool:
    try:
        config_changes(base.config, small, tuple(range(small.layers)))
    except LegolmError:
        return False
    return True


def _out_of_reach(block: BlockConfig, base: Base) -> LegolmError:
    """The error that says how far a budget can go."""
    kept = decoder_weights(smallest(base))
    parameters = base.parameters_of(kept)
    for name, value, least, largest in (
        ("sparsity", block.sparsity, 0, math.floor(1000 * (1 - kept / decoder_weights(base.shape))) / 1000),
        ("params", block.params, parameters, base.parameters),
        ("memory", block.memory, parameters * base.dtype.itemsize, base.parameters * base.dtype.itemsize),
    ):
        if value is not None:
            return LegolmError(f"blocks: {block.name!r} wants {name} {value}; this model gives {least} to {largest}")
    return LegolmError(f"blocks: {block.name!r} wants speedup {block.speedup}; no shape here is as fast")
