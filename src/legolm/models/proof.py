"""The proof that a family is what its layout says: a small random copy, cut and run in all the ways that ours are.

What our forward leaves out (a multiplier, attention sinks, another mask), what a cut loses and what a reloaded config
forgets shows as a difference, whatever the family.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from legolm.data import Tokens
from legolm.errors import LegolmError, brief
from legolm.models.calls import recorded
from legolm.models.cut import narrow, sizes_in, tell
from legolm.models.family import Shape, Unit, decoder_layers, shape_of
from legolm.models.head import Head
from legolm.models.layout import VOCABULARY, Layout
from legolm.models.lean import hidden_states, lean
from legolm.models.packing import pack
from legolm.models.transposed import as_linears

LENGTHS = (11, 9, 4)
"""Of the examples: longer than the copy's sliding window, and in two buckets."""
SPREAD = 3.0
"""Of a matrix's outputs, for inputs of 1: attention is sharp, and soft caps are felt."""
ALIKE = 1e-3
"""Relative difference that rounding in float32 may make."""


def prove(config: Any, fixed: dict[str, str]) -> Layout:
    """The layout of a small config whose `fixed` is known. Raises `LegolmError` that names the check that failed."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        as_linears(decoder_layers(model))
        for name, parameter in model.named_parameters():
            spread = SPREAD / parameter.shape[-1] ** 0.5
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter) if parameter.dim() < 2 else 0)
            if parameter.dim() >= 2:
                parameter.normal_(0, 1 if "embed" in name else spread)
        model.requires_grad_(False)
        tokens = torch.randint(1, VOCABULARY, (len(LENGTHS), LENGTHS[0]))
        _check(config, "layer by layer equals the whole", lambda: _layer_by_layer(model, tokens))
        _check(config, "packed equals one at a time", lambda: _packed(model, tokens))
        layout = _look(model, tokens, fixed)
        _check(config, "cut, saved and loaded equals cut in memory", lambda: _cut(model, tokens, layout))
    return layout


def _check(config: Any, name: str, differences: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
    try:
        reason = next((_said(a, b) for a, b in differences() if not _alike(a, b)), None)
    except Exception as error:  # whatever transformers' code raises for what it was not made for
        reason = brief(error)
    if reason is not None:
        raise LegolmError(
            f"model: family {config.model_type!r} is not proved: on a two-layer random copy of this config, the check "
            f"`{name}` failed ({reason}); such a model would be cut or trained wrongly"
        )


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= ALIKE * wanted.norm())


def _said(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"shapes {list(found.shape)} and {list(wanted.shape)}"
    return f"relative difference {float((found - wanted).norm() / wanted.norm()):.2g}"


def _layer_by_layer(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    layers = decoder_layers(model)
    wanted: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: wanted.append(output)) for layer in layers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    with recorded(layers) as (inputs, calls):
        model(tokens)
    hidden, found = inputs[0], []
    for layer, call in zip(layers, calls, strict=True):
        hidden = call.again(layer, hidden)
        found.append(hidden)
    return list(zip(found, wanted, strict=True))


def _packed(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    examples = [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]
    alone = torch.cat([model(example[None]).logits[0] for example in examples])
    with lean(model, "fp32"):
        packing = pack([Tokens(tuple(example.tolist()), 1) for example in examples], tokens.device)
        found = Head.of(model, "fp32").logits(hidden_states(model, packing))
    return [(found, alone)]


def _look(model: Any, tokens: Tensor, fixed: dict[str, str]) -> Layout:
    """Follow the answers of attention and MLP to the residual stream."""
    layer = decoder_layers(model)[-1]
    shape = shape_of(model.config)
    norms: dict[str, str] = {}
    answers: dict[str, Tensor] = {}
    hooks = []
    for path, module in layer.named_modules():
        if path in (shape.reader("query"), shape.reader("neuron")):
            hooks.append(module.register_forward_hook(lambda _m, _i, out, path=path: answers.update({path: out})))
        elif path and not isinstance(module, nn.Linear | nn.Dropout):

            def reads(_module: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
                norms.update({name: path for name, answer in answers.items() if inputs and inputs[0] is answer})

            hooks.append(module.register_forward_pre_hook(reads))
    output: list[Tensor] = []
    hooks.append(layer.register_forward_hook(lambda _m, _i, out: output.append(out)))
    model(tokens)
    last = shape.reader("neuron")
    step = torch.randn_like(answers[last])
    end = layer.get_submodule(norms.get(last, last))
    hooks.append(end.register_forward_hook(lambda _m, _i, out: out + step.view_as(out)))
    model(tokens)
    for hook in hooks:
        hook.remove()
    moved = (output[1] - output[0]).view_as(step)
    added = float((moved * step).sum() / step.square().sum())
    if not _alike(moved, added * step) or added == 0:
        why = "its layers normalise the sum of the MLP's answer and the residual stream"
        return Layout(norms=norms, added=1.0, fixed={"layers": why, "neurons": why} | fixed)
    return Layout(norms=norms, added=float(f"{added:.5g}"), fixed=fixed)


def _cut(model: Any, tokens: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """The last layer alone, of the second KV group and every other neuron, as far as the family lets it be cut."""
    from transformers import AutoModelForCausalLM

    shape, layers = shape_of(model.config), decoder_layers(model)
    kept = range(shape.layers) if "layers" in layout.fixed else range(shape.layers - 1, shape.layers)
    units: dict[Unit, Tensor] = {"neuron": torch.arange(shape.neurons), "query": torch.arange(shape.kv_groups)}
    if "neurons" not in layout.fixed:
        units["neuron"] = units["neuron"][::2]
    if "kv_groups" not in layout.fixed:
        units["query"] = units["query"][-1:]
    neurons, groups = len(units["neuron"]), len(units["query"])
    small = replace(shape, layers=len(kept), kv_groups=groups, neurons=neurons)
    changes = sizes_in(model.config, small, kept)

    block = copy.deepcopy(model)
    block_layers = decoder_layers(block)
    for layer in block_layers:
        for name, module in shape.modules.items():
            linear: Any = layer.get_submodule(name)
            rows = torch.cat(_rows(shape, module.rows, units))
            narrow(linear, linear.weight.data[rows][:, _index(shape, module.cols, units)].clone(), rows)
        tell(layer, changes)
    with recorded(layers) as (_, calls):
        model(tokens)

    # The same in the whole model: columns that are cut at zero, layers that are dropped passed by.
    whole = copy.deepcopy(model)
    ends: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(decoder_layers(whole)):
        for unit in units:
            weight = layer.get_parameter(f"{shape.reader(unit)}.weight")
            gone = torch.ones(shape.size(unit), dtype=torch.bool)
            gone[_index(shape, unit, units)] = False
            weight[:, gone] = 0
        if index not in kept:
            layer.forward = lambda hidden, *_others, **_named: hidden
    hook = decoder_layers(whole)[-1].register_forward_hook(lambda _m, given, out: ends.append((given[0], out)))
    wanted = whole(tokens).logits
    hook.remove()
    (given, out), *_ = ends
    found = [(calls[-1].again(block_layers[-1], given), out)]

    block_layers.__init__([block_layers[index] for index in kept])  # type: ignore[misc]
    block.config.update(changes)
    with tempfile.TemporaryDirectory(prefix="legolm-") as folder:
        block.save_pretrained(folder)
        loaded, said = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    wrong = {kind: names for kind, names in said.items() if names}
    if wrong:
        raise LegolmError(str(wrong))
    return [*found, (loaded.eval()(tokens).logits, wanted)]


def _index(shape: Shape, unit: Unit, kept: dict[Unit, Tensor]) -> Tensor:
    """Rows (or columns) of a run of units that stay."""
    if unit == "hidden":
        return torch.arange(shape.hidden)
    width = shape.per_group(unit)
    chosen = kept["neuron" if unit == "neuron" else "query"]
    return (chosen[:, None] * width + torch.arange(width)).flatten()


def _rows(shape: Shape, units: tuple[Unit, ...], kept: dict[Unit, Tensor]) -> list[Tensor]:
    parts, start = [], 0
    for unit in units:
        parts.append(start + _index(shape, unit, kept))
        start += shape.size(unit)
    return parts
