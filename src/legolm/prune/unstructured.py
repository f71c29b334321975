"""Unstructured and N:M blocks: zeros under a recorded mask, every shape as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from legolm.coverage import Coverage
from legolm.models import Shape
from legolm.prune.calibrate import Moments, Source, Stream
from legolm.prune.registry import Criterion, Pattern


class UnstructuredCut:
    """One block in the making. Each layer is calibrated on what the pruned ones below it send."""

    def __init__(self, shape: Shape, criterion: Criterion, pattern: Pattern, source: Source | None) -> None:
        self._shape, self._criterion, self._pattern, self._source = shape, criterion, pattern, source
        self._masks: dict[str, Tensor] = {}

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module:
        """The pruned copy of an LLM layer."""
        pruned = copy.deepcopy(layer)
        moments: Mapping[str, Moments] = {}
        if self._source is not None:
            moments = self._source.moments(index, pruned, self._criterion.needs)
        for name in self._shape.modules:
            linear = pruned.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, mask = self._criterion.prune(linear.weight.data, moments.get(name), self._pattern)
            linear.weight.data.copy_(weight)
            self._masks[f"layers.{index}.{name}"] = mask
        if self._source is not None:
            self._source.advance(index, pruned)
        return pruned

    @property
    def coverage(self) -> Coverage:
        """What the block kept."""
        full = Coverage.full(self._shape)
        return Coverage(self._shape, full.layers, full.groups, full.neurons, self._masks)
