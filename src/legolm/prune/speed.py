"""How fast a shape generates on this machine, measured: what `speedup` means.

A token's time is a constant (head, sampling), and for each layer a constant (its calls) and its weights. Two depths of
the LLM's shape and of one with half the neurons tell all three, so any shape's time is known before it is tried. Where
calls cost much, as in small models, that asks for fewer layers rather than for narrower ones. Weights are random; all
take turns, and the fastest turn counts: other work only adds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM

from legolm.block import Base
from legolm.errors import LegolmError
from legolm.models import Shape, config_changes
from legolm.prune.target import smallest, step_of

DEPTHS = (1, 5)
TURNS, TOKENS = 7, 8
TRIES = 4
ALLOWED = 0.02
"""A shape this much slower than wanted is as fast as wanted: no measurement here is better."""


@dataclass(frozen=True)
class Clock:
    """Seconds a generated token: `fixed`, and for each layer `layer` and `weight` for each of its linear weights."""

    fixed: float
    layer: float
    weight: float

    def seconds(self, layers: int, weights: float) -> float:
        """Of a decoder with so many linear weights in so many layers."""
        return self.fixed + layers * self.layer + weights * self.weight

    def weights(self, seconds: float, layers: int) -> float:
        """The decoder's linear weights that take so long; negative when its layers alone take longer."""
        return (seconds - self.seconds(layers, 0)) / self.weight


def read_clock(base: Base) -> Clock:
    """Measure the LLM's shape and a narrower one: batch 1, this process's threads, the checkpoint's dtype."""
    wide = base.shape
    # Of a width that blocks have: others take longer than their weights say.
    half, step = wide.neurons // 2, step_of(wide)
    narrow = replace(wide, neurons=half // step * step or half)
    times = _times(base, wide, narrow)
    (fixed, each), (_, less) = times
    weight = max((each - less) / (wide.layer_weights - narrow.layer_weights), 0.01 * each / wide.layer_weights)
    return Clock(max(fixed, 0.0), max(each - weight * wide.layer_weights, 0.0), weight)


def speedup(base: Base, small: Shape) -> float:
    """Tokens generated a second by a block of this shape over those by the LLM, both measured now."""
    (fixed, each), (small_fixed, small_each) = _times(base, base.shape, small)
    return (fixed + base.shape.layers * each) / (small_fixed + small.layers * small_each)


def shape_for(base: Base, wanted: float, best: Callable[[Callable[[int], float]], Shape], name: str) -> Shape:
    """The best shape that is `wanted` times as fast.

    `best` gets the decoder's weights that the time leaves, by number of layers. What it takes is measured too, and less
    time is asked for when it is too slow. Raises `LegolmError` when no shape is as fast.
    """
    clock = read_clock(base)
    whole = clock.seconds(base.shape.layers, base.shape.layers * base.shape.layer_weights)
    least = smallest(base)
    most = whole / clock.seconds(least.layers, least.layers * least.layer_weights)
    if wanted > most:
        raise LegolmError(
            f"blocks: {name!r} wants speedup {wanted}; no shape here is as fast: at most about {most:.2f}"
        )
    seconds, fastest = whole / wanted, 1.0
    for _ in range(TRIES):
        budget = seconds
        shape = best(lambda layers, budget=budget: clock.weights(budget, layers))  # type: ignore[misc]
        factor = speedup(base, shape)
        if factor >= (1 - ALLOWED) * wanted:
            return shape
        fastest = max(fastest, factor)
        seconds *= factor / wanted
    raise LegolmError(f"blocks: {name!r} wants speedup {wanted}; the fastest shape tried has {fastest:.2f}")


def _times(base: Base, *shapes: Shape) -> list[tuple[float, float]]:
    """Seconds a generated token of each shape: without layers, and for each layer."""
    models = [_model(base, shape, depth) for shape in shapes for depth in DEPTHS]
    turns = [[_seconds(model) for model in models] for _ in range(TURNS + 1)][1:]
    fastest = iter([min(turn[i] for turn in turns) / TOKENS for i in range(len(models))])
    found = []
    for shallow, deep in zip(fastest, fastest, strict=True):
        each = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
        found.append((shallow - DEPTHS[0] * each, each))
    return found


def _model(base: Base, shape: Shape, depth: int) -> torch.nn.Module:
    config = copy.deepcopy(base.config)
    # In a model of fewer layers than are measured their kinds come again.
    config.update(config_changes(config, replace(shape, layers=depth), [i % shape.layers for i in range(depth)]))
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def _seconds(model: torch.nn.Module) -> float:
    ids = torch.ones(1, 8, dtype=torch.int64)
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0)  # type: ignore[operator]
    return time.perf_counter() - began
