"""Unstructured and N:M blocks: zeros under a recorded mask, every shape as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from legolm.block import Coverage, pack_mask, unpack_mask
from legolm.models import Shape
from legolm.prune.calibrate import Source, Stream
from legolm.prune.moments import Moments
from legolm.prune.registry import Criterion, Pattern


class UnstructuredCut:
    """One block in the making. Each matrix is calibrated on what the pruned ones before it send."""

    def __init__(self, shape: Shape, criterion: Criterion, pattern: Pattern, source: Source | None) -> None:
        self._shape, self._criterion, self._pattern, self._source = shape, criterion, pattern, source
        self._masks: dict[str, Tensor] = {}  # as bits: a byte a weight would be half of the LLM

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module:
        """The pruned copy of an LLM layer."""
        pruned = copy.deepcopy(layer)

        def prune(names: Iterable[str], moments: Moments | None) -> None:
            for name in names:
                linear = pruned.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                weight, mask = self._criterion.prune(linear.weight.data, moments, self._pattern)
                linear.weight.data.copy_(weight)
                self._masks[f"layers.{index}.{name}"] = pack_mask(mask)

        if self._source is None:
            prune(self._shape.modules, None)
        else:
            self._source.prune(index, pruned, self._criterion.needs, prune)
        return pruned

    @property
    def coverage(self) -> Coverage:
        """What the block kept."""
        full = Coverage.full(self._shape)
        masks = {
            f"layers.{index}.{name}": unpack_mask(self._masks[f"layers.{index}.{name}"], self._shape.matrix(name))
            for index in range(self._shape.layers)
            for name in self._shape.modules
        }
        return Coverage(self._shape, full.layers, full.groups, full.neurons, masks)
