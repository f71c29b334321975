"""Private calibration: sums of activation statistics instead of text.

A client runs the dense model over its own text, layer by layer, and keeps counts and second moments of what each
linear layer reads. Only these sums leave it. They add up: the sums of several clients are those of their pooled text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from legolm.config import Precision
from legolm.errors import LegolmError
from legolm.models import LayeredModel, Shape, choose_device, shape_of
from legolm.prune.calibrate import Moments, Needs, PruneGroup, Regression, Stream, inputs_of
from legolm.system import Progress, atomic_write, open_tensors, strict_json


@dataclass(frozen=True)
class Statistics:
    """Moments by `layers.{LLM layer}.{first of the modules that read the same tensor}`; a `Source` for cuts."""

    shape: Shape
    base_fingerprint: str
    needs: Needs
    sums: Mapping[str, Moments]

    def prune(self, index: int, layer: nn.Module, needs: Needs, prune: PruneGroup) -> None:
        """All with the moments in the dense model. Raises `LegolmError` when they are not enough."""
        for group in inputs_of(self.shape.modules):
            device = layer.get_parameter(f"{group[0]}.weight").device
            prune(group, self._moments(index, group[0], needs).on(device))

    def regression(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None) -> Regression:
        """The linear layer should answer as it did: W x. Raises `LegolmError` when the moments are not enough."""
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found = Regression(linear)
        found.moments.absorb(self._moments(index, name, "full"))
        found.cross += linear.weight.data @ found.moments.sum
        return found

    def advance(self, index: int, layer: nn.Module) -> None:
        """Nothing to do: the sums are the dense model's, whatever was cut below."""

    def _moments(self, index: int, name: str, needs: Needs) -> Moments:
        if needs == "full" and self.needs != "full":
            raise LegolmError(
                "calibration.statistics: these are squares only, for wanda; run: legolm calibrate --needs full"
            )
        (first,) = (group[0] for group in inputs_of(self.shape.modules) if name in group)
        return self.sums[f"layers.{index}.{first}"]


def collect(
    base: Path, fingerprint: str, tokens: Tensor, needs: Needs, precision: Precision, progress: Progress
) -> Statistics:
    """The sums over token ids (samples, length) in the dense model."""
    model = LayeredModel(base, choose_device("auto"))
    shape = shape_of(model.config)
    stream = Stream.start(model, tokens, precision)
    sums: dict[str, Moments] = {}
    with progress.stage("collect statistics", shape.layers) as advance:
        for index in range(shape.layers):
            with model.layer(index) as layer:
                found = stream.moments(index, layer, needs)
                sums |= {f"layers.{index}.{group[0]}": found[group[0]] for group in inputs_of(shape.modules)}
                stream.advance(index, layer)
            advance(1)
    return Statistics(shape, fingerprint, needs, sums)


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One safetensors file: counts and sums, of x xᵀ the lower triangle, float32."""
    header = {
        "shape": asdict(statistics.shape),
        "base_fingerprint": statistics.base_fingerprint,
        "needs": statistics.needs,
        "tokens": {name: moments.tokens for name, moments in statistics.sums.items()},
    }
    tensors = {name: moments.packed() for name, moments in statistics.sums.items()}
    atomic_write(path, save(tensors, metadata={"legolm": json.dumps(header)}))


def load_statistics(paths: Sequence[Path], shape: Shape, fingerprint: str) -> Statistics:
    """The sum over several clients' files. Raises `LegolmError` for one that is broken or of another model."""
    files = [_load(path, shape, fingerprint) for path in paths]
    needs: Needs = "full" if all(one.needs == "full" for one in files) else "diagonal"
    if any(one.needs != needs for one in files):
        raise LegolmError("calibration.statistics: some files are squares only; collect all with the same --needs")
    sums = dict(files[0].sums)
    for other in files[1:]:
        for name, moments in other.sums.items():
            sums[name].absorb(moments)
    return Statistics(shape, fingerprint, needs, sums)


def _load(path: Path, shape: Shape, fingerprint: str) -> Statistics:
    with open_tensors(path, "calibration.statistics: ", "collect it again with `legolm calibrate`") as handle:
        header: dict[str, Any] = strict_json((handle.metadata() or {})["legolm"])
        if (header["base_fingerprint"], header["shape"]) != (fingerprint, asdict(shape)):
            raise LegolmError(f"calibration.statistics: {path} was collected on another base model")
        needs: Needs = "full" if header["needs"] == "full" else "diagonal"
        sums = {}
        for index in range(shape.layers):
            for group in inputs_of(shape.modules):
                name = f"layers.{index}.{group[0]}"
                features = shape.matrix(group[0])[1]
                sums[name] = Moments.unpacked(handle.get_tensor(name), int(header["tokens"][name]), features, needs)
    return Statistics(shape, fingerprint, needs, sums)
