"""Where to cut: how many layers, KV groups and neurons a budget leaves, chosen together by what each would cost.

A pass over the dense model gives, for each layer, the share of the hidden states' energy that is lost when some of its
units go and the rest is fitted anew (`select`), and when the layer goes as a whole. These shares add up along the
residual stream to first order, so the shape with the smallest weighted sum is taken. One width and one number of heads
serve all layers: anything else no `from_pretrained` would load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from legolm.models import LayeredModel, Shape, Unit
from legolm.prune.calibrate import Stream
from legolm.prune.moments import Moments, Regression
from legolm.prune.select import eliminate

SAMPLES, STEP = 8, 12
"""Calibration samples, and care in choosing units, that the costs are measured with: they only have to rank shapes."""


WEIGHTS: dict[Unit, float] = {"query": 2.5, "neuron": 1.0}
LAYER_WEIGHT = 0.6
"""What a share lost is worth, from the perplexities of five shapes of SmolLM2-135M at half of its weights. Attention
that is wrong misleads all later tokens; the layer before a dropped one makes up for a part."""
EQUAL = 1.02
"""Costs this near do not say which is better, and each layer less saves its calls: the shallower is faster."""


@dataclass(frozen=True)
class Costs:
    """Shares of energy lost, by LLM layer: `units[unit][layer]` at (units left, share), `layers[layer]` without it."""

    units: dict[Unit, tuple[tuple[tuple[int, float], ...], ...]]
    layers: tuple[float, ...]

    def kept_layers(self, count: int) -> tuple[int, ...]:
        """The layers that are dearest to lose, ascending."""
        order = sorted(range(len(self.layers)), key=lambda index: (-self.layers[index], index))
        return tuple(sorted(order[:count]))

    def of(self, shape: Shape) -> float:
        """Weighted sum over the layers of what it costs to have only this shape."""
        kept = self.kept_layers(shape.layers)
        lost = LAYER_WEIGHT * sum(share for index, share in enumerate(self.layers) if index not in kept)
        for unit, curves in self.units.items():
            left = shape.kv_groups if unit == "query" else shape.neurons
            lost += WEIGHTS[unit] * sum(_at(curves[index], left) for index in kept)
        return lost


def measure_costs(
    model: LayeredModel, shape: Shape, stream: Stream, units: Sequence[Unit], progress: Callable[[int], None]
) -> Costs:
    """Go through the dense model. Without `units` only the layers' costs are known."""
    curves: dict[Unit, list[tuple[tuple[int, float], ...]]] = {unit: [] for unit in units}
    layers: list[float] = []
    for index in range(shape.layers):
        with model.layer(index) as layer:
            before, moments = stream.hidden.clone(), dict[str, Moments]()
            if units:
                moments = stream.moments(index, layer, "full")
            else:
                stream.advance(index, layer)
            energy = stream.hidden.square().sum(-1)
            layers.append(float(((stream.hidden - before).square().sum(-1) / energy).mean()))
            for unit in units:
                reader = layer.get_submodule(shape.reader(unit))
                assert isinstance(reader, nn.Linear)
                fit = Regression(reader)
                fit.moments.absorb(moments[shape.reader(unit)])
                fit.cross += reader.weight.data @ fit.moments.sum
                path = eliminate(fit, reader.weight.data, shape.per_group(unit), 1, STEP).errors
                # The median: a few tokens carry most of the energy, and no layer but one writes them.
                whole = float(energy.median()) * energy.numel()
                curves[unit].append(tuple((left, error / whole) for left, error in path))
        progress(1)
    return Costs({unit: tuple(found) for unit, found in curves.items()}, tuple(layers))


def choose(shapes: Sequence[Shape], costs: Costs) -> Shape:
    """The shape that loses least; of those as good (`EQUAL`) the one with the fewest layers, then the best of these."""
    lost = {shape: costs.of(shape) for shape in shapes}
    least = min(lost.values())
    return min((shape for shape in shapes if lost[shape] <= EQUAL * least), key=lambda one: (one.layers, lost[one]))


def _at(curve: tuple[tuple[int, float], ...], left: int) -> float:
    """The curve at a number of units, between its points linearly."""
    counts, shares = zip(*reversed(curve), strict=True)
    return float(np.interp(left, counts, shares))
