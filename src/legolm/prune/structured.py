"""Structured pruning: really smaller matrices that a plain `from_pretrained` loads.

Layers go by block influence (ShortGPT, Men et al., arXiv 2403.03853). KV groups and MLP neurons go by the energy that
they send on, E[a²] · ‖column of the next matrix‖². The matrix whose inputs were cut is then fitted by least squares on
what the cut layers below it really send, to give the hidden states that the dense model has there: so that a layer
also makes up for what the layers below it, or the dropped ones after it, left wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from legolm.config import Precision
from legolm.coverage import Coverage
from legolm.models import Shape, decoder_layers, family_of
from legolm.prune.calibrate import Regression, Stream
from legolm.prune.target import config_changes

RIDGE = 1e-3


def cut_structured(
    model: Any, shape: Shape, small: Shape, tokens: Tensor, precision: Precision, progress: Callable[[int], None]
) -> Coverage:
    """Cut the model in place to the shape `small` and return what it kept. Calls progress(1) for each kept layer."""
    layers = decoder_layers(model)
    o_proj, down_proj = shape.reader("query"), shape.reader("neuron")
    kept_layers = tuple(range(shape.layers))
    if small.layers < shape.layers:
        kept_layers = _influential(model, small.layers, Stream(model, tokens, precision))
    changes = config_changes(model.config, small, kept_layers)
    config = copy.deepcopy(model.config)
    config.update(changes)
    dense, cut = Stream(model, tokens, precision), Stream(model, tokens, precision)
    groups: list[tuple[int, ...]] = []
    neurons: list[tuple[int, ...]] = []
    for i in range(kept_layers[0]):
        dense.advance(i, layers[i])
    for index, following in pairwise([*kept_layers, shape.layers]):
        layer = layers[index]
        middle = dense.middle(index, layer) if small.kv_groups < shape.kv_groups else []
        for i in range(index, following):
            dense.advance(i, layers[i])

        kept_groups, kept_neurons = tuple(range(shape.kv_groups)), tuple(range(shape.neurons))
        if small.kv_groups < shape.kv_groups:
            fit = cut.regression(index, layer, o_proj, middle)
            kept_groups = _most_energy(layer, o_proj, fit, shape.per_group("query"), small.kv_groups)
            _carve(layer, Coverage(shape, (index,), (kept_groups,), (kept_neurons,)), o_proj, fit)
            _tell(layer, config)
        if small.neurons < shape.neurons or following > index + 1:
            fit = cut.regression(index, layer, down_proj, dense.hidden)
            kept_neurons = _most_energy(layer, down_proj, fit, 1, small.neurons)
            _carve(layer, Coverage(shape, (index,), (kept_groups,), (kept_neurons,)), down_proj, fit)
        groups.append(kept_groups)
        neurons.append(kept_neurons)
        cut.advance(index, layer)
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


def _most_energy(layer: nn.Module, name: str, fit: Regression, width: int, count: int) -> tuple[int, ...]:
    """Units (runs of `width` input columns) of a module with the largest energy, ascending."""
    weight: Tensor = layer.get_submodule(name).weight  # type: ignore[assignment]
    energy = (fit.moments.mean_square * weight.square().sum(0)).view(-1, width).sum(1)
    return tuple(sorted(energy.argsort(descending=True, stable=True)[:count].tolist()))


def _carve(layer: nn.Module, coverage: Coverage, fitted: str, fit: Regression) -> None:
    """Cut, in place, the module `fitted` and those that feed it, and fit it anew."""
    (index,) = coverage.layers
    part = fitted.partition(".")[0]
    for name in (name for name in coverage.shape.modules if name.startswith(part)):
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows, weight = coverage.rows(index, name), linear.weight.data
        if name == fitted:
            weight = _refit(weight, fit, coverage.cols(index, name))
        if rows is not None:
            weight = weight[rows].clone()
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.data[rows].clone(), requires_grad=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.out_features, linear.in_features = weight.shape


def _tell(layer: nn.Module, config: Any) -> None:
    """Give a layer the config of the cut model: Phi-3's attention splits its fused matrix by it when it runs."""
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = config
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = config.num_key_value_heads


def _refit(weight: Tensor, fit: Regression, cols: Tensor | None) -> Tensor:
    """argmin over V of E‖y − V x[cols]‖², with a small ridge towards the kept columns of `weight`; float64."""
    kept = slice(None) if cols is None else cols
    normal = fit.moments.sum.double()[kept][:, kept]
    ridge = RIDGE * normal.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    wanted = fit.cross.double()[:, kept] + ridge * weight[:, kept].double()
    normal.diagonal().add_(ridge)
    refitted: Tensor = torch.linalg.solve(normal, wanted, left=False)
    return refitted.to(weight.dtype)


def _renumber(model: Any, kept: tuple[int, ...]) -> None:
    """Keep the chosen layers and number them from 0, as `from_pretrained` will."""
    layers = decoder_layers(model)
    chosen = nn.ModuleList(layers[i] for i in kept)
    model.set_submodule(family_of(model.config).layers, chosen)
    for j, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = j  # type: ignore[assignment]
