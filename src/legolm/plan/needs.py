"""What training a block takes, from its coverage alone: a model of one process, which benchmarks/memory.py measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from legolm.adapter import adapter_parameters, modules_of
from legolm.block import Coverage
from legolm.config import Precision, TrainConfig
from legolm.models import CHUNK, LONG, Layout

PROCESS_BYTES = 420_000_000
"""Python with torch, transformers and a model's classes, before any weights."""
HOLES = 4 / 3
"""What the heap takes for what backward needs: micro-batches differ in size, layers free what the next cannot use."""


@dataclass(frozen=True)
class Settings:
    """What of `train` a memory budget may decide; no result depends on it but by rounding."""

    micro_batch_tokens: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Trainee:
    """A block in training: all that its memory depends on beside the batch.

    `trains` is the part of its coverage whose adapter trains, of `rank` on `targets`. `others` counts the parameters
    that are no linear weight of the decoder. A checkpoint stores `width` bytes a parameter. `masked` says that bit
    masks go with the weights, `folded` how many bytes of factors it holds that rounds before folded into its base.
    `layout` is the LLM's.
    """

    coverage: Coverage
    trains: Coverage
    others: int
    vocabulary: int
    width: int
    targets: list[str] | None
    rank: int
    masked: bool = False
    folded: int = 0
    layout: Layout = field(default_factory=Layout)

    @cached_property
    def linears(self) -> int:
        """Linear weights that are in memory, pruned ones under a mask too."""
        coverage = self.coverage
        return sum(math.prod(coverage.matrix(j, module)) for j in coverage.layers for module in coverage.shape.modules)

    @cached_property
    def adapter(self) -> int:
        """Entries of the factors."""
        return adapter_parameters(self.trains, self.targets, self.rank)

    @property
    def masks(self) -> int:
        """Bytes of bit masks, a bool each."""
        return self.linears if self.masked else 0

    @cached_property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """What backward needs of each layer for a token, in the products' dtype: (entries, attention heads).

        From the first layer on that trains: below it there is no backward pass.
        """
        first = min(self.trains.layers)
        return tuple(self._kept_of(layer) for layer in self.coverage.layers if layer >= first)

    def _kept_of(self, layer: int) -> tuple[int, int]:
        coverage, shape = self.coverage, self.coverage.shape
        place = coverage.layers.index(layer)
        groups, neurons = len(coverage.groups[place]), len(coverage.neurons[place])
        heads = groups * shape.queries_per_group
        query, key = heads * shape.head_dim, groups * shape.head_dim
        # Attention's queries, keys and values; the activation's input and, where it gates, both sides of the product.
        gated = sum(module.rows.count("neuron") for module in shape.modules.values()) > 1
        entries = query + 2 * key + (3 if gated else 1) * neurons
        entries += query + key if self.layout.query_norms else 0  # which are kept twice then
        entries += shape.hidden * len(self.layout.norms)
        inputs = {}
        for name in modules_of(shape, self.targets) if layer in self.trains.layers else ():
            module = shape.module(name)
            inputs[module.cols, "neuron" in module.rows] = coverage.matrix(layer, name)[1]
            entries += self.rank
        return entries + sum(inputs.values()), heads


def training_bytes(trainee: Trainee, lengths: Sequence[int], settings: Settings, precision: Precision) -> int:
    """Peak resident memory (bytes) of a process that trains on a batch of examples of these `lengths` (tokens).

    Weights in the products' dtype, the head's copy, six float32 copies of the adapter (what was received, parameter,
    gradient, two Adam moments, the last good state), what backward needs of one micro-batch, and a chunk's logits. Or
    what loading takes, if that is more: float32 weights and the file.
    """
    low, hidden = 2 if precision == "bf16" else 4, trainee.coverage.shape.hidden
    longest = max(lengths)
    tokens = max(longest, min(sum(lengths), settings.micro_batch_tokens))
    attended = longest if longest <= LONG else 0  # beyond, the fused kernel keeps none of the attention weights
    # Both norms' inputs are the float32 residual stream.
    layers = [8 * hidden + low * (entries + heads * attended) for entries, heads in trainee.kept]
    # Of a layer that is computed again: its gradients, too, which else take the place of what was used up.
    kept = 4 * hidden * len(layers) + 2 * max(layers) if settings.gradient_checkpointing else sum(layers)
    head = low * trainee.vocabulary * hidden if precision == "bf16" else 0
    joint = low * (trainee.linears + trainee.adapter)  # the factors have room beside the weights
    stays = joint + 4 * trainee.others + head + trainee.masks + 24 * trainee.adapter
    if trainee.folded:  # the weights as they were stay, too
        stays += trainee.folded + low * trainee.linears
    working = HOLES * tokens * kept + 4 * 4 * CHUNK * trainee.vocabulary
    loading = (4 + trainee.width) * (trainee.linears + trainee.others) + trainee.masks
    return int(PROCESS_BYTES + max(stays + working, loading))


def worst_batch(lengths: Sequence[int], size: int) -> list[int]:
    """The `size` longest of a client's examples; of fewer, some stand in a batch more than once."""
    return sorted(list(lengths) * math.ceil(size / len(lengths)), reverse=True)[:size]


def settings_of(train: TrainConfig) -> Settings:
    """As configured: those of a client without a budget."""
    return Settings(train.micro_batch_tokens, train.gradient_checkpointing)


def leaner(train: TrainConfig, lengths: Sequence[int]) -> Iterator[Settings]:
    """Settings for a batch of these lengths, fastest first: as configured, smaller micro-batches, checkpointing."""
    longest, total = max(lengths), sum(lengths)
    sizes, parts = [train.micro_batch_tokens], 2
    while sizes[-1] > longest:
        size = max(longest, math.ceil(total / parts))
        if size < sizes[-1]:
            sizes.append(size)
        parts *= 2
    for checkpointing in (False, True):
        if checkpointing or not train.gradient_checkpointing:
            yield from (Settings(size, checkpointing) for size in sizes)
