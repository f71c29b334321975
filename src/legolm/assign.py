"""Which client gets which block, and how much memory fine-tuning it takes."""

from __future__ import annotations

from collections.abc import Mapping

from legolm.config import ClientConfig, LoraConfig, RunConfig, TrainConfig
from legolm.coverage import Coverage, factor_shape, modules_of
from legolm.types import LegolmError

PROCESS_BYTES = 500_000_000
"""Python with torch and transformers, before any model."""


def adapter_parameters(coverage: Coverage, targets: list[str] | None, rank: int) -> int:
    """Entries of A and B over all modules that a block holds."""
    shapes = (
        factor_shape(coverage, f"layers.{layer}.{module}.{side}", rank)
        for layer in coverage.layers
        for module in modules_of(coverage.shape, targets)
        for side in "AB"
    )
    return sum(rows * cols for rows, cols in shapes)


def training_bytes(
    coverage: Coverage, parameters: int, vocabulary: int, length: int, train: TrainConfig, lora: LoraConfig
) -> int:
    """Estimated peak memory (bytes) of fine-tuning a block: an upper estimate, measured by benchmarks/memory.py.

    fp32 weights, four fp32 copies of the adapter (parameter, gradient, two Adam moments), what backward needs of each
    layer for a batch of `length` tokens an example, and three copies of the answer logits.
    """
    shape = coverage.shape
    tokens = train.batch_size * length
    kept_layers = len(coverage.layers)
    neurons = sum(map(len, coverage.neurons)) / kept_layers
    per_token = kept_layers * (20 * shape.hidden + 10 * neurons) + 3 * vocabulary
    adapter = adapter_parameters(coverage, lora.targets, lora.rank)
    return int(PROCESS_BYTES + 4 * parameters + 16 * adapter + 4 * tokens * per_token)


def assign(config: RunConfig, needs: Mapping[str, int], parameters: Mapping[str, int]) -> dict[str, str]:
    """Block name of each client: as configured, or the one with the most parameters that its profile can hold.

    `needs` is the training memory (bytes) of each block. Raises `LegolmError` when no block fits a profile.
    """
    return {client.id: client.block or _largest_that_fits(client, needs, parameters) for client in config.clients}


def _largest_that_fits(client: ClientConfig, needs: Mapping[str, int], parameters: Mapping[str, int]) -> str:
    assert client.profile is not None
    budget = client.profile.memory_mb * 1e6
    fitting = [name for name, need in needs.items() if need <= budget]
    if not fitting:
        least = min(needs.values()) / 1e6
        raise LegolmError(
            f"clients: {client.id!r} has {client.profile.memory_mb:.0f} MB; the smallest block needs {least:.0f} MB; "
            "add a smaller block, or lower train.batch_size or train.max_length"
        )
    return max(fitting, key=lambda name: parameters[name])
