"""Run the decoder layer by layer on calibration tokens and sum what pruning needs to know of each linear input."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

from legolm.config import Precision
from legolm.data import check_length
from legolm.errors import LegolmError
from legolm.models import Call, LayeredModel, Layout, Module, Shape, autocast, layout_of, recorded, shape_of
from legolm.prune.moments import Answers, Moments, Needs, Regression
from legolm.system import available_bytes, total_bytes

CHUNK = 4
"""Samples a forward pass where all at once would take too much: enough to keep the matrix units busy."""
WHOLE_SHARE = 16
"""All samples take one forward pass when its activations need no more than this part of the machine's memory."""
LIVE = 4
"""Tensors as wide as a layer's widest that are alive at once in it, about."""
SPILL_SHARE = 8
"""Hidden states that take more than this part of the free memory go to disk."""


PruneGroup = Callable[[Sequence[str], Moments], None]
"""Changes, in place, the linear layers of these names; they read the tensor with these moments."""
CutEnd = Callable[[Regression], Tensor | None]
"""Changes, in place, a linear layer that is to answer so, and those that feed it; which inputs stay (None: all)."""


class Source(Protocol):
    """What a cut asks of the calibration, layer by layer; `layer` is the block's own, as far as it is cut."""

    def prune(self, index: int, layer: nn.Module, needs: Needs, prune: PruneGroup) -> None:
        """Let `prune` change the layer's matrices, those that read one tensor at a time, and go on to the next layer.

        They come in the order in which the layer runs them, each with the moments of what it reads.
        """

    def regression(self, index: int, layer: nn.Module, name: str) -> Regression:
        """How the linear layer `name` answers."""

    def end(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None, cut: CutEnd) -> None:
        """Let `cut` change the linear layer `name`, which ends the MLP, and what feeds it, and go on to the next layer.

        `cut` gets how it should answer for the layer to give `wanted`, where that is known.
        """

    def advance(self, index: int, layer: nn.Module, same: Stream | None = None) -> None:
        """Go on to the next layer with what this one sends; `same` is what has just gone through the same layers."""


class Stream:
    """Hidden states (samples, length, hidden; float32) of all calibration samples between two decoder layers.

    They wait on the CPU; the layers are on `device`.
    """

    def __init__(
        self,
        hidden: Tensor,
        chunk: int,
        calls: dict[int, list[Call]],
        shape: Shape,
        layout: Layout,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.hidden, self._device = hidden, device
        self._chunk, self._calls, self._shape, self._layout = chunk, calls, shape, layout
        self._precision: Precision = precision

    @staticmethod
    def start(model: LayeredModel, tokens: Tensor, precision: Precision) -> Stream:
        """What the first decoder layer receives for token ids (samples, length)."""
        check_length(tokens.shape[1], model.config.max_position_embeddings, "calibration")
        shape = shape_of(model.config)
        hidden = _buffer((*tokens.shape, shape.hidden))
        calls: dict[int, list[Call]] = {}
        activations = 4 * LIVE * tokens.numel() * max(shape.hidden, shape.neurons)
        chunk = len(tokens) if activations * WHOLE_SHARE <= total_bytes() else CHUNK
        with model.rest() as decoder:
            for part in _parts(len(tokens), chunk):
                # Chunks of one size have the same masks and positions.
                with recorded(model.layers) as (inputs, made):
                    decoder(input_ids=tokens[part].to(model.device), use_cache=False)
                hidden[part] = inputs[0]
                calls.setdefault(len(inputs[0]), made)
        return Stream(hidden, chunk, calls, shape, layout_of(model.config), precision, model.device)

    def fork(self) -> Stream:
        """Another stream from here, which another cut goes on with."""
        hidden = _buffer(self.hidden.shape).copy_(self.hidden)
        return Stream(hidden, self._chunk, self._calls, self._shape, self._layout, self._precision, self._device)

    def run(self, index: int, layer: nn.Module) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(samples, input, output) of one decoder layer for each chunk, without moving on."""
        with torch.no_grad(), autocast(self._precision, self._device.type):
            for part in _parts(len(self.hidden), self._chunk):
                hidden = self.hidden[part].to(self._device)
                yield part, hidden, self._calls[len(hidden)][index].again(layer, hidden)

    def advance(self, index: int, layer: nn.Module, same: Stream | None = None) -> None:
        """Replace the hidden states by the layer's outputs, or by those of `same`, which has gone through the same.

        Raises `LegolmError` when they are not finite.
        """
        if same is not None:
            self.hidden.copy_(same.hidden)
            return
        for part, _, output in self.run(index, layer):
            self._go_on(index, part, output)

    def _go_on(self, index: int, part: slice, output: Tensor) -> None:
        if not bool(output.isfinite().all()):
            raise LegolmError(f"calibration: layer {index} gives values that are not finite; check the model's weights")
        self.hidden[part] = output

    def prune(self, index: int, layer: nn.Module, needs: Needs, prune: PruneGroup) -> None:
        """Go on through the layer, whose matrices `prune` changes on the way.

        Each is calibrated on what the pruned ones before it send, in the layer itself too (as GPTQ's "true sequential"
        order has it; one pass instead of one to measure and one to go on). In chunks the layer runs again for each
        tensor that is read, and only so far.
        """
        groups = inputs_of(self._shape.modules)
        if self._chunk < len(self.hidden):
            for group in groups:
                moments = _moments(layer, group, needs)
                for inputs in self._inputs(index, layer, group[0]):
                    moments.add(inputs)
                prune(group, moments)
            self.advance(index, layer)
            return
        hooks = []
        for group in groups:
            reached = _first_only(group, _moments(layer, group, needs), prune)
            hooks += [layer.get_submodule(name).register_forward_pre_hook(reached) for name in group]
        try:
            self.advance(index, layer)
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(self, index: int, layer: nn.Module, name: str) -> Iterator[Tensor]:
        """What the linear layer `name` reads in each chunk; what comes after it in the layer does not run."""

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        hook = layer.get_submodule(name).register_forward_pre_hook(stop)
        try:
            for part in _parts(len(self.hidden), self._chunk):
                hidden = self.hidden[part].to(self._device)
                with torch.no_grad(), autocast(self._precision, self._device.type):
                    try:
                        self._calls[len(hidden)][index].again(layer, hidden)
                    except _Reached as reached:
                        found = reached.inputs
                yield found
        finally:
            hook.remove()

    def regression(self, index: int, layer: nn.Module, name: str) -> Regression:
        """How the matrix that ends attention answers. What comes after it does not run."""
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        answers = Answers(linear, self._norm(layer, name), self._layout.added)
        for inputs in self._inputs(index, layer, name):
            with torch.no_grad(), autocast(self._precision, self._device.type):
                answers.add(inputs, linear_function(inputs, linear.weight, linear.bias), None)
        return answers.sums

    def end(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None, cut: CutEnd) -> None:
        """Let `cut` change the matrix that ends the MLP, and those that feed it, and go on to the next layer.

        It is to answer for the layer to give `wanted`. In one pass: what the layer gives changes only by what this
        matrix answers otherwise. In chunks, whose answers would not all fit into memory, the layer runs again.
        """
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        norm = self._norm(layer, name)
        answers = Answers(linear, norm, self._layout.added)
        seen: dict[str, Tensor] = {}
        hook = linear.register_forward_hook(lambda _module, inputs, output: seen.update(x=inputs[0], y=output))
        try:
            for part, _, output in self.run(index, layer):
                error = None if wanted is None else wanted[part].to(self._device) - output
                answers.add(seen["x"], seen["y"], error)
        finally:
            hook.remove()
        stay = cut(answers.sums)
        if self._chunk < len(self.hidden):
            self.advance(index, layer)
            return
        with torch.no_grad(), autocast(self._precision, self._device.type):
            now = linear(seen["x"] if stay is None else seen["x"][..., stay])
            change = norm(now.float()) - norm(seen["y"].float())
            self._go_on(index, part, output + self._layout.added * change.view_as(output))

    def _norm(self, layer: nn.Module, name: str) -> nn.Module:
        """What stands between the answer of the matrix that ends attention or MLP and the residual stream."""
        after = self._layout.norms.get(name)
        return nn.Identity() if after is None else layer.get_submodule(after)

    def moments(self, index: int, layer: nn.Module, needs: Needs) -> dict[str, Moments]:
        """Go on through the layer, and give moments of what its linear layers read; who shares an input shares them."""
        shared: dict[str, Moments] = {}
        hooks = []
        for group in inputs_of(self._shape.modules):
            found = _moments(layer, group, needs)
            shared |= dict.fromkeys(group, found)
            hooks.append(layer.get_submodule(group[0]).register_forward_pre_hook(_adder(found)))
        try:
            self.advance(index, layer)
        finally:
            for hook in hooks:
                hook.remove()
        return shared


class _Reached(Exception):
    """Ends a forward pass where a linear layer reads `inputs`."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _moments(layer: nn.Module, group: Sequence[str], needs: Needs) -> Moments:
    linear = layer.get_submodule(group[0])
    assert isinstance(linear, nn.Linear)
    return Moments(linear.in_features, needs, linear.weight.device)


def _first_only(
    group: Sequence[str], moments: Moments, prune: PruneGroup
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook for all of a group, which acts before the first of them that runs."""

    def reached(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not moments.tokens:
            moments.add(inputs[0])
            prune(group, moments)

    return reached


def _adder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: moments.add(inputs[0])


def inputs_of(modules: Mapping[str, Module]) -> list[list[str]]:
    """Group modules that read the same tensor: q, k, v; gate, up."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((name.rpartition(".")[0], module.cols), []).append(name)
    return list(groups.values())


def first_readers(modules: Mapping[str, Module]) -> dict[str, str]:
    """Of each module the first one that reads the same tensor, after which its sums are named."""
    return {name: group[0] for group in inputs_of(modules) for name in group}


def _parts(samples: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


def _buffer(shape: Sequence[int]) -> Tensor:
    """Room for hidden states: in memory, or in a file that vanishes with it when memory is short."""
    sizes = tuple(shape)
    count = math.prod(sizes)
    if 4 * count * SPILL_SHARE <= available_bytes():
        return torch.empty(sizes)
    with tempfile.NamedTemporaryFile(prefix="legolm-", suffix=".hidden") as file:
        return torch.from_file(file.name, shared=True, size=count).view(sizes)
