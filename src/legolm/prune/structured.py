"""Structured blocks: really smaller matrices that a plain `from_pretrained` loads.

Neurons and KV groups go by the structured optimal brain surgeon (`select`), whole layers by `allocate`. A matrix whose
inputs were cut is fitted by least squares on what the cut layers below it really send. The one that ends attention is
to answer as before. The one that ends the MLP is to give the hidden states that the dense model has after the layer: so
it also makes up for what the layers below it, or the dropped ones after it, left wrong. (Attention that tries the same
fits the calibration text and little else.)
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from legolm.block import Coverage, slice_matrix
from legolm.models import Shape, Unit, config_changes, narrow, tell
from legolm.prune.calibrate import Source, Stream
from legolm.prune.moments import Regression
from legolm.prune.select import eliminate, refit


class StructuredCut:
    """One block in the making: takes the LLM's layers in order and gives the block's own.

    `small` is the block's shape, `kept` the LLM layers that it keeps, ascending, `config` the LLM's.
    """

    def __init__(self, shape: Shape, small: Shape, kept: tuple[int, ...], config: Any, source: Source) -> None:
        self._shape, self._small, self._kept, self._source = shape, small, kept, source
        self._changes = config_changes(config, small, kept)
        self._layer: nn.Module | None = None
        self._at = 0
        self._groups: list[tuple[int, ...]] = []
        self._neurons: list[tuple[int, ...]] = []

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module | None:
        """The block's next layer, once the dense model has passed all that it stands for; else None.

        `dense` is the dense model after the LLM layer `index`; None where only sums of statistics are known.
        """
        shape, small = self._shape, self._small
        if index in self._kept:
            self._layer, self._at = copy.deepcopy(layer), index
            self._groups.append(tuple(range(shape.kv_groups)))
            self._neurons.append(tuple(range(shape.neurons)))
            if small.kv_groups < shape.kv_groups:
                fit = self._source.regression(index, self._layer, shape.reader("query"))
                self._cut(self._layer, "query", small.kv_groups, fit)
                tell(self._layer, self._changes)
        if self._layer is None or not (index + 1 in self._kept or index + 1 == shape.layers):
            return None
        finished, self._layer = self._layer, None
        if small.neurons < shape.neurons or index > self._at:
            wanted, cut = None if dense is None else dense.hidden, partial(self._cut, finished, "neuron", small.neurons)
            self._source.end(self._at, finished, shape.reader("neuron"), wanted, cut)
        else:
            # Up to its first dropped layer a block that only loses layers does what the dense model does.
            same = small.kv_groups == shape.kv_groups and self._kept[: index + 1] == tuple(range(index + 1))
            self._source.advance(self._at, finished, dense if same else None)
        return finished

    @property
    def coverage(self) -> Coverage:
        """What the block kept, so far."""
        kept = self._kept[: len(self._groups)]
        return Coverage(self._shape, kept, tuple(self._groups), tuple(self._neurons))

    def _cut(self, layer: nn.Module, unit: Unit, count: int, fit: Regression) -> Tensor | None:
        """Cut, in place, the matrix that reads `unit` and those that feed it, and fit it anew; its inputs that stay."""
        reader = self._shape.reader(unit)
        linear = layer.get_submodule(reader)
        assert isinstance(linear, nn.Linear)
        kept = eliminate(fit, linear.weight.data, self._shape.per_group(unit), count).kept
        (self._groups if unit == "query" else self._neurons)[-1] = kept
        coverage = Coverage(self._shape, (self._at,), (self._groups[-1],), (self._neurons[-1],))
        stay = coverage.cols(self._at, reader)
        for name, spec in self._shape.modules.items():
            if ("neuron" in (*spec.rows, spec.cols)) != (unit == "neuron"):
                continue
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            if name == reader:
                weight = refit(fit, module.weight.data, stay)
            else:
                weight = slice_matrix(coverage, self._at, name, module.weight.data)
            narrow(module, weight, coverage.rows(self._at, name))
        return stay
