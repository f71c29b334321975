"""What the rounds start from: fresh factors, a PEFT adapter, or the best global adapter of an earlier run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from legolm.adapter import Tensors, initial_factors, is_frozen, load_adapter
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.wire import arrived
from legolm.runs import RunDir, best_round, checked_state, read_stages
from legolm.system import derive_seed, open_tensors


def begin(config: RunConfig, llm: Block, folder: RunDir, state: Tensors | None = None) -> Scheme:
    """The run's scheme at its start, or at a state that it kept in `folder`."""
    scheme = make_scheme(config.aggregate)
    start = Start(
        llm.coverage.shape,
        lambda: start_factors(config, llm) | (frozen_factors(folder) if scheme.whitened is not None else {}),
        config.lora.rank,
        derive_seed(config.seed, "adapter"),
        config.aggregate,
        partial(arrived, name=config.federation.codec),
    )
    scheme.begin(start, state)
    return scheme


def frozen_factors(folder: RunDir) -> Tensors:
    """Those that are made of text (`whitening.whiten`), in the LLM's coordinates."""
    with open_tensors(folder.frozen, "the frozen factors: ", "remove it") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)


def start_factors(config: RunConfig, llm: Block) -> Tensors:
    """The LLM's factors before the first round. Raises `LegolmError` for a start that does not fit this run."""
    lora, aggregate, shape = config.lora, config.aggregate, llm.coverage.shape
    seed, frozen = derive_seed(config.seed, "adapter"), make_scheme(aggregate).frozen_side
    factors = initial_factors(shape, lora.targets, lora.rank, seed, frozen, lora.ranks)
    if lora.start is not None:
        factors = load_adapter(Path(lora.start), factors, shape, lora.scaling)
    if aggregate.start is not None:
        factors = _warm_factors(Path(aggregate.start), llm, factors, config, frozen)
    for key, tensor in factors.items():
        if not bool(tensor.isfinite().all()):
            field = "lora.start" if aggregate.start is None else "aggregate.start"
            raise LegolmError(f"{field}: {key} is not finite; take another adapter")
    return factors


def _warm_factors(path: Path, llm: Block, like: Tensors, config: RunConfig, frozen_side: bool) -> Tensors:
    """Factors of the run in `path` after its best round; `like` are those that a cold start has."""
    run, where = RunDir(path), f"aggregate.start {path}"
    try:
        best = best_round(read_stages(path / "metrics.jsonl"), "validation")
        state = checked_state(run.round(best.round), best)
        known = run.identity()
    except (LegolmError, ValueError) as error:
        raise LegolmError(f"{where}: is no run folder with a finished round ({error})") from None
    if known.base_fingerprint != llm.base_fingerprint:
        raise LegolmError(f"{where}: was run on another base model")
    earlier = run.known()
    if earlier.lora.scaling != config.lora.scaling:
        raise LegolmError(f"{where}: has lora.scale {earlier.lora.scaling}; this run has {config.lora.scaling}")
    if any(key.startswith("fold.") for key in state):
        raise LegolmError(f"{where}: scheme {earlier.aggregate.scheme!r} changed the base; take another run")
    factors: Tensors = {}
    for key, tensor in like.items():
        if key not in state or state[key].shape != tensor.shape:
            found = tuple(state[key].shape) if key in state else "missing"
            raise LegolmError(f"{where}: {key} is {found}; lora.rank and lora.targets must be this run's")
        if frozen_side and is_frozen(key, llm.coverage.shape) and not torch.equal(state[key], tensor):
            raise LegolmError(f"{where}: its frozen factors are not this run's; take its form and seed")
        factors[key] = state[key]
    return factors
