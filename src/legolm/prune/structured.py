"""Structured pruning: really smaller matrices that a plain `from_pretrained` loads.

Layers go by block influence (ShortGPT, Men et al., arXiv 2403.03853). KV groups and MLP neurons go by the energy that
they send on, E[a²] · ‖column of the next matrix‖², and the matrix whose inputs were cut is refitted by least squares
to give what it gave before. Layer by layer, so that each layer is fitted on what the cut layers below it send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from legolm.config import Precision
from legolm.coverage import Coverage
from legolm.models import MODULES, Shape, decoder_layers
from legolm.prune.calibrate import Moments, Stream
from legolm.prune.target import config_changes

RIDGE = 1e-3


def cut_structured(
    model: Any, shape: Shape, small: Shape, tokens: Tensor, precision: Precision, progress: Callable[[int], None]
) -> Coverage:
    """Cut the model in place to the shape `small` and return what it kept. Calls progress(1) for each kept layer."""
    layers = decoder_layers(model)
    kept_layers = tuple(range(shape.layers))
    if small.layers < shape.layers:
        kept_layers = _influential(model, small.layers, Stream(model, tokens, precision))
    changes = config_changes(model.config, small, kept_layers)
    stream = Stream(model, tokens, precision)
    groups: list[tuple[int, ...]] = []
    neurons: list[tuple[int, ...]] = []
    for index in kept_layers:
        layer = layers[index]
        moments = stream.moments(index, layer, ["self_attn.o_proj", "mlp.down_proj"], "full")
        groups.append(_most_energy(layer, "self_attn.o_proj", moments, shape.per_group("query"), small.kv_groups))
        neurons.append(_most_energy(layer, "mlp.down_proj", moments, 1, small.neurons))
        one = Coverage(shape, (index,), (groups[-1],), (neurons[-1],))
        for name in MODULES:
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            _carve(linear, one.rows(index, name), one.cols(index, name), moments.get(name))
        stream.advance(index, layer)
        progress(1)
    _renumber(model, kept_layers)
    # Only now: the model reads its depth from the config when it runs.
    model.config.update(changes)
    return Coverage(shape, kept_layers, tuple(groups), tuple(neurons))


def _influential(model: Any, count: int, stream: Stream) -> tuple[int, ...]:
    """The layers with the largest block influence, 1 − E[cos(input, output)], ascending."""
    influence = []
    for index, layer in enumerate(decoder_layers(model)):
        cosines = [torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in stream.run(index, layer)]
        influence.append(1 - torch.cat(cosines).mean())
        stream.advance(index, layer)
    best = torch.stack(influence).argsort(descending=True, stable=True)[:count]
    return tuple(sorted(best.tolist()))


def _most_energy(layer: nn.Module, name: str, moments: dict[str, Moments], width: int, count: int) -> tuple[int, ...]:
    """Units (runs of `width` input columns) of a module with the largest energy, ascending."""
    weight: Tensor = layer.get_submodule(name).weight  # type: ignore[assignment]
    energy = (moments[name].mean_square * weight.square().sum(0)).view(-1, width).sum(1)
    return tuple(sorted(energy.argsort(descending=True, stable=True)[:count].tolist()))


def _carve(linear: nn.Linear, rows: Tensor | None, cols: Tensor | None, moments: Moments | None) -> None:
    """Keep some rows or columns in place; cut columns are made up for by least squares on the kept ones."""
    weight = linear.weight.data
    if cols is not None:
        assert moments is not None
        weight = _refit(weight, moments.sum, cols)
    if rows is not None:
        weight = weight[rows].clone()
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows].clone(), requires_grad=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def _refit(weight: Tensor, moment: Tensor, cols: Tensor) -> Tensor:
    """argmin over V of E‖W x − V x[cols]‖², with a small ridge towards the kept columns; float64."""
    h = moment.double()
    normal = h[cols][:, cols]
    ridge = RIDGE * normal.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    target = weight.double() @ h[:, cols] + ridge * weight[:, cols].double()
    normal.diagonal().add_(ridge)
    refitted: Tensor = torch.linalg.solve(normal, target, left=False)
    return refitted.to(weight.dtype)


def _renumber(model: Any, kept: tuple[int, ...]) -> None:
    """Keep the chosen layers and number them from 0, as `from_pretrained` will."""
    layers = decoder_layers(model)
    chosen = [layers[i] for i in kept]
    model.get_decoder().layers = nn.ModuleList(chosen)
    for j, layer in enumerate(chosen):
        layer.self_attn.layer_idx = j  # type: ignore[union-attr]
