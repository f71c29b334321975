"""What the rounds start from: fresh factors, a PEFT adapter, or the best global adapter of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from legolm.adapter import Tensors, initial_factors, is_frozen, load_adapter
from legolm.block import Block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.runs import RunDir
from legolm.system import derive_seed, read_json


def start_factors(config: RunConfig, llm: Block) -> Tensors:
    """The LLM's factors before the first round. Raises `LegolmError` for a start that does not fit this run."""
    lora, aggregate, shape = config.lora, config.aggregate, llm.coverage.shape
    seed, frozen = derive_seed(config.seed, "adapter"), aggregate.form == "frozen_side"
    factors = initial_factors(shape, lora.targets, lora.rank, seed, frozen, lora.ranks)
    if lora.start is not None:
        factors = load_adapter(Path(lora.start), factors, shape, lora.scaling)
    if aggregate.start is not None:
        factors = _warm_factors(Path(aggregate.start), llm, factors, config)
    for key, tensor in factors.items():
        if not bool(tensor.isfinite().all()):
            field = "lora.start" if aggregate.start is None else "aggregate.start"
            raise LegolmError(f"{field}: {key} is not finite; take another adapter")
    return factors


def _warm_factors(path: Path, llm: Block, like: Tensors, config: RunConfig) -> Tensors:
    """Factors of the run in `path` after its best round; `like` are those that a cold start has."""
    run, where = RunDir(path), f"aggregate.start {path}"
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["stage"] == "round"]
        best = min((record["validation"], record["round"]) for record in records)[1]
        state = load_file(run.round(best) / "adapter.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise LegolmError(f"{where}: is no run folder with a finished round") from None
    known = read_json(path / "run.json", "base_fingerprint")
    if known["base_fingerprint"] != llm.base_fingerprint:
        raise LegolmError(f"{where}: was run on another base model")
    scale = run.config().lora.scaling
    if scale != config.lora.scaling:
        raise LegolmError(f"{where}: has lora.scale {scale}; this run has {config.lora.scaling}")
    if any(key.startswith("fold.") for key in state):
        raise LegolmError(f"{where}: scheme {run.config().aggregate.scheme!r} changed the base; take another run")
    factors: Tensors = {}
    for key, tensor in like.items():
        if key not in state or state[key].shape != tensor.shape:
            found = tuple(state[key].shape) if key in state else "missing"
            raise LegolmError(f"{where}: {key} is {found}; lora.rank and lora.targets must be this run's")
        if (
            config.aggregate.form == "frozen_side"
            and is_frozen(key, llm.coverage.shape)
            and not torch.equal(state[key], tensor)
        ):
            raise LegolmError(f"{where}: its frozen factors are not this run's; take its form and seed")
        factors[key] = state[key]
    return factors
