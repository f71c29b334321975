"""What training a block takes, from its coverage alone."""

from __future__ import annotations

from collections.abc import Iterator

from legolm.adapter import adapter_parameters
from legolm.block import Coverage
from legolm.config import LoraConfig, Precision, TrainConfig
from legolm.models import CHUNK, LONG


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


PROCESS_BYTES = 600_000_000
"""Python with torch and transformers, before any model."""
