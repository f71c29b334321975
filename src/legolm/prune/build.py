"""Cut one block: calibrate, prune, recover, write a normal checkpoint with its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from legolm.config import BlockConfig, Precision
from legolm.coverage import Coverage
from legolm.data import calibration_tokens
from legolm.models import Shape, decoder_layers, load_config, load_model, load_tokenizer, save_model, shape_of
from legolm.models.load import count_parameters
from legolm.prune import magnitude, sparsegpt, wanda  # noqa: F401 (they register themselves)
from legolm.prune.calibrate import Stream
from legolm.prune.manifest import Manifest, read_block, write_block
from legolm.prune.recover import recover
from legolm.prune.registry import CRITERIA, Criterion, Pattern
from legolm.prune.structured import cut_structured
from legolm.prune.target import target_pattern, target_shape
from legolm.rundir import atomic_folder
from legolm.types import Block

Progress = Callable[[int], None]


def cut_block(
    base: Path,
    fingerprint: str,
    spec: BlockConfig,
    out: Path,
    seed: int,
    precision: Precision = "fp32",
    progress: Progress = lambda _: None,
) -> Block:
    """Cut the block `spec` from the checkpoint at `base` into the folder `out`, whole or not at all.

    Calls progress(1) for each layer cut and each step of recovery. Raises `LegolmError` for bad targets or text.
    """
    began = time.perf_counter()
    shape = shape_of(load_config(base))
    small = target_shape(spec, shape)
    tokenizer = load_tokenizer(base)
    model = load_model(base)
    coverage = _prune(model, shape, small, spec, tokenizer, seed, precision, progress)
    details: dict[str, Any] = {"target": spec.model_dump(mode="json", exclude={"name", "method"}, exclude_none=True)}
    if spec.recover.steps:
        details["recover"] = recover(model, coverage, base, tokenizer, spec, precision, seed, progress)
    details["seconds"] = time.perf_counter() - began
    with atomic_folder(out) as partial:
        save_model(model, tokenizer, partial, load_config(base).dtype or torch.float32)
        manifest = Manifest(
            name=spec.name,
            method=spec.method,
            base_fingerprint=fingerprint,
            coverage_hash=coverage.hash,
            parameters=count_parameters(partial),
            sparsity=coverage.sparsity,
            details=details,
        )
        write_block(manifest, coverage, partial)
    return read_block(out)


def _prune(
    model: Any,
    shape: Shape,
    small: Shape,
    spec: BlockConfig,
    tokenizer: Any,
    seed: int,
    precision: Precision,
    progress: Progress,
) -> Coverage:
    if spec.method == "dense":
        return Coverage.full(shape)
    if spec.method == "structured":
        tokens = calibration_tokens(spec.calibration, tokenizer, seed)
        return cut_structured(model, shape, small, tokens, precision, progress)
    criterion = CRITERIA[spec.method]
    stream = None
    if criterion.needs != "nothing":
        stream = Stream(model, calibration_tokens(spec.calibration, tokenizer, seed), precision)
    return _cut_unstructured(model, shape, criterion, target_pattern(spec, shape), stream, progress)


def _cut_unstructured(
    model: Any, shape: Shape, criterion: Criterion, pattern: Pattern, stream: Stream | None, progress: Progress
) -> Coverage:
    """Zero weights in place, layer by layer, so that each layer is calibrated on what the pruned ones below send."""
    masks: dict[str, Tensor] = {}
    for index, layer in enumerate(decoder_layers(model)):
        moments = {} if stream is None else stream.moments(index, layer, criterion.needs)
        for name in shape.modules:
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, mask = criterion.prune(linear.weight.data, moments.get(name), pattern)
            linear.weight.data.copy_(weight)
            masks[f"layers.{index}.{name}"] = mask
        if stream is not None:
            stream.advance(index, layer)
        progress(1)
    full = Coverage.full(shape)
    return Coverage(shape, full.layers, full.groups, full.neurons, masks)
