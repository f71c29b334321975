"""What a run will do and need, before it does anything: the dry run, the disk check and the number of actors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from legolm.assign import adapter_parameters, assign, training_bytes
from legolm.config import RunConfig
from legolm.coverage import Coverage
from legolm.data import render
from legolm.federate.client import client_data
from legolm.memory import available_bytes
from legolm.models import load_config, load_tokenizer, resolve
from legolm.prune import Base, planned_coverage, target_pattern
from legolm.types import ClientData, LegolmError

SPARE_BYTES = 1 << 30
"""Memory left to the server and the system when actors are counted."""


@dataclass(frozen=True)
class PlannedBlock:
    """Sizes of one block: stored parameters, checkpoint bytes, peak bytes of fine-tuning it."""

    name: str
    method: str
    sparsity: float
    parameters: int
    file_bytes: int
    training_bytes: int


@dataclass(frozen=True)
class PlannedClient:
    """One client's work in a round: examples held, tokens trained on, adapter bytes each way."""

    id: str
    block: str
    examples: int
    tokens_per_round: int
    bytes_per_round: int


@dataclass(frozen=True)
class Plan:
    """The whole run. `disk_bytes` is what the run folder will hold, `memory_bytes` the peak over all processes."""

    base: Path
    blocks: tuple[PlannedBlock, ...]
    clients: tuple[PlannedClient, ...]
    data: dict[str, ClientData]
    actors: int
    memory_bytes: int
    disk_bytes: int


def make_plan(config: RunConfig) -> Plan:
    """Resolve the model, read the data and add up. Raises `LegolmError` for whatever cannot work."""
    path = resolve(config.model)
    model = load_config(path)
    # Nothing here asks whose weights they are, and the fingerprint takes time.
    base = Base.of(path, "", model)
    shape, width = base.shape, base.dtype.itemsize
    data = client_data(config)
    tokenizer = load_tokenizer(path)
    lengths = {
        client: [len(render(row, tokenizer, config.train.max_length).ids) for row in rows.train]
        for client, rows in data.items()
    }
    longest = max(max(found) for found in lengths.values())

    coverages: dict[str, Coverage] = {}
    blocks, shaped = [], ("dense", "structured")
    for spec in config.blocks:
        coverage = coverages[spec.name] = planned_coverage(spec, base)
        parameters = base.parameters_of(coverage.kept_weights)
        blocks.append(
            PlannedBlock(
                name=spec.name,
                method=spec.method,
                sparsity=coverage.sparsity if spec.method in shaped else target_pattern(spec, shape).sparsity,
                parameters=parameters,
                file_bytes=parameters * width,
                training_bytes=training_bytes(
                    coverage, parameters, model.vocab_size, longest, config.train, config.lora
                ),
            )
        )
    needs = {block.name: block.training_bytes for block in blocks}
    block_of = assign(config, needs, {block.name: block.parameters for block in blocks})

    clients = []
    for client in config.clients:
        block = block_of[client.id]
        mean_length = sum(lengths[client.id]) / len(lengths[client.id])
        rank = client.rank or config.lora.rank
        adapter = 4 * adapter_parameters(coverages[block], config.lora.targets, rank)
        tokens = round(config.train.steps * config.train.batch_size * mean_length)
        clients.append(PlannedClient(client.id, block, len(lengths[client.id]), tokens, adapter))

    used = [needs[block] for block in set(block_of.values())]
    whole = training_bytes(Coverage.full(shape), base.parameters, model.vocab_size, longest, config.train, config.lora)
    actors = _actors(config, max(*used, whole))
    size_of = {block.name: block.file_bytes for block in blocks}
    adapter = 8 * adapter_parameters(Coverage.full(shape), config.lora.targets, config.lora.rank)
    disk = base.parameters * width + sum(size_of.values()) + sum(size_of[client.block] for client in clients)
    disk += adapter * (config.federation.rounds + 1 + 2 * len(clients))
    return Plan(path, tuple(blocks), tuple(clients), data, actors, SPARE_BYTES + actors * max(*used, whole), disk)


def _actors(config: RunConfig, need: int) -> int:
    """As many clients at once as cores and memory allow, and never more than there are."""
    if config.federation.engine == "local":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_memory = (available_bytes() - SPARE_BYTES) // need
    if by_memory < 1:
        raise LegolmError(
            f"memory: one client needs {need / 1e9:.1f} GB beside {SPARE_BYTES / 1e9:.1f} GB for the server; "
            "lower train.batch_size or train.max_length"
        )
    return max(1, min(cores // config.federation.threads, by_memory, len(config.clients)))
