"""Which client gets which block, and how much memory fine-tuning it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from legolm.config import ClientConfig, LoraConfig, Precision, RunConfig, TrainConfig
from legolm.coverage import Coverage, factor_shape, modules_of
from legolm.finetune.loss import CHUNK
from legolm.finetune.packing import LONG
from legolm.types import LegolmError

PROCESS_BYTES = 600_000_000
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
    coverage: Coverage,
    parameters: int,
    vocabulary: int,
    length: int,
    train: TrainConfig,
    lora: LoraConfig,
    precision: Precision,
) -> int:
    """Estimated peak memory (bytes) of fine-tuning a block: an upper estimate, measured by benchmarks/memory.py.

    Weights, six float32 copies of the adapter (parameter, gradient, two Adam moments, what was received, the last good
    state), what backward needs of each layer for one micro-batch whose longest example has `length` tokens, and a
    chunk's logits. Or what loading takes, if that is more: the file and float32 weights.
    """
    shape, low = coverage.shape, 2 if precision == "bf16" else 4
    layers = len(coverage.layers)
    tokens = max(min(train.batch_size * length, train.micro_batch_tokens), length)
    linears = sum(rows * cols for rows, cols in _matrices(coverage))
    head = 0 if precision == "fp32" else low * vocabulary * shape.hidden
    weights = low * linears + 4 * (parameters - linears) + head
    # Both norms' inputs are the float32 residual stream; the rest is in the products' dtype.
    neurons = sum(map(len, coverage.neurons)) / layers
    heads = sum(map(len, coverage.groups)) / layers * shape.queries_per_group
    attention = 6 * heads * shape.head_dim + heads * min(length, LONG)
    layer = 8 * shape.hidden + low * (3 * shape.hidden + attention + 4 * neurons)
    kept = layer + layers * 4 * shape.hidden if train.gradient_checkpointing else layers * layer
    # Micro-batches differ in size, and the heap keeps holes: a third more.
    working = 4 / 3 * tokens * kept + 4 * 4 * CHUNK * vocabulary
    training = weights + 24 * adapter_parameters(coverage, lora.targets, lora.rank) + working
    return int(PROCESS_BYTES + max(training, 6 * parameters))


def _matrices(coverage: Coverage) -> Iterator[tuple[int, int]]:
    return (coverage.matrix(layer, module) for layer in coverage.layers for module in coverage.shape.modules)


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
            "add a smaller block, or lower train.micro_batch_tokens or train.max_length"
        )
    return max(fitting, key=lambda name: parameters[name])
