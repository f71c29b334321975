"""How fast a shape generates on this machine, measured: what `speedup` means.

Random weights do, and few layers: time is linear in depth, so two depths of each shape tell the whole. Block and LLM
take turns, and medians are compared, because machines are noisy.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from legolm.models import Shape
from legolm.prune.target import Base, config_changes, decoder_weights
from legolm.types import LegolmError

DEPTHS = (1, 3)
TURNS, TOKENS = 5, 8
HALVINGS = 6


def speedup(base: Base, small: Shape) -> float:
    """Tokens generated a second by a block of this shape over those by the LLM, batch 1, this process's threads."""
    models = [_model(base, shape, depth) for shape in (base.shape, small) for depth in DEPTHS]
    turns = [[_seconds(model) for model in models] for _ in range(TURNS + 1)][1:]
    times = [median(turn[i] for turn in turns) for i in range(len(models))]
    return _at_depth(base.shape.layers, times[:2]) / _at_depth(small.layers, times[2:])


def shape_for(base: Base, wanted: float, best: Callable[[float], Shape], name: str) -> Shape:
    """The largest shape found that is `wanted` times as fast, by halving.

    `best(kept_weights)` is the shape to take at a number of decoder weights. Raises `LegolmError` when none is as fast.
    """
    low, high, fastest = 0.0, float(decoder_weights(base.shape)), 1.0
    found: Shape | None = None
    for _ in range(HALVINGS):
        kept = (low + high) / 2
        shape = best(kept)
        factor = speedup(base, shape)
        fastest = max(fastest, factor)
        if factor >= wanted:
            low, found = kept, shape
        else:
            high = kept
    if found is None:
        raise LegolmError(f"blocks: {name!r} wants speedup {wanted}; the fastest shape here has {fastest:.2f}")
    return found


def _at_depth(layers: int, times: list[float]) -> float:
    return times[0] + (times[1] - times[0]) / (DEPTHS[1] - DEPTHS[0]) * (layers - DEPTHS[0])


def _model(base: Base, shape: Shape, depth: int) -> torch.nn.Module:
    kept = tuple(range(depth))
    config = copy.deepcopy(base.config)
    config.update(config_changes(config, shape, tuple(range(shape.layers))))
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def _seconds(model: torch.nn.Module) -> float:
    ids = torch.ones(1, 8, dtype=torch.int64)
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0)  # type: ignore[operator]
    return time.perf_counter() - began
