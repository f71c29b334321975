"""Private calibration: sums of activation statistics instead of text.

A client runs the dense model over its own text, layer by layer, and keeps counts and second moments of what each
linear layer reads. Only these sums leave it. They add up: the sums of several clients are those of their pooled text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from legolm.config import CLIENTS, CalibrationConfig, Precision
from legolm.errors import LegolmError
from legolm.models import LayeredModel, Shape, choose_device, load_config, shape_of
from legolm.prune.calibrate import CutEnd, PruneGroup, Stream, inputs_of
from legolm.prune.moments import Moments, Needs, Regression
from legolm.prune.sketch import restore, sketch
from legolm.system import Progress, atomic_write, derive_seed, open_tensors, strict_json


@dataclass(frozen=True)
class Statistics:
    """Moments by `layers.{LLM layer}.{first of the modules that read the same tensor}`; a `Source` for cuts."""

    shape: Shape
    base_fingerprint: str
    needs: Needs
    sums: Mapping[str, Moments]

    def prune(self, index: int, layer: nn.Module, needs: Needs, prune: PruneGroup) -> None:
        """All with the moments in the dense model."""
        for group in inputs_of(self.shape.modules):
            device = layer.get_parameter(f"{group[0]}.weight").device
            prune(group, self._moments(index, group[0]).on(device))

    def regression(self, index: int, layer: nn.Module, name: str) -> Regression:
        """The linear layer should answer as it did: W x."""
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found = Regression(linear)
        found.moments.absorb(self._moments(index, name))
        found.cross += linear.weight.data @ found.moments.sum
        return found

    def end(self, index: int, layer: nn.Module, name: str, wanted: Tensor | None, cut: CutEnd) -> None:
        """The same of the one that ends the MLP."""
        cut(self.regression(index, layer, name))

    def advance(self, index: int, layer: nn.Module, same: Stream | None = None) -> None:
        """Nothing to do: the sums are the dense model's, whatever was cut below."""

    @staticmethod
    def unflat(sums: Tensor, tokens: int, shape: Shape, fingerprint: str, needs: Needs) -> Statistics:
        """What `flat` gave, over so many tokens. Raises `ValueError` when it does not fit, or is no sum of squares."""
        if sums.shape != (flat_size(shape, needs),):
            raise ValueError(f"sums of shape {tuple(sums.shape)}; {flat_size(shape, needs)} numbers were asked for")
        features = _features(shape)
        parts = torch.split(sums, [_size(one, needs) for one in features.values()])
        found = {
            name: Moments.unpacked(part, tokens, one, needs)
            for (name, one), part in zip(features.items(), parts, strict=True)
        }
        return Statistics(shape, fingerprint, needs, found)

    @staticmethod
    def restored(
        squares: Tensor, sketches: Tensor, tokens: int, shape: Shape, fingerprint: str, columns: int, seed: int
    ) -> Statistics:
        """What `sketched` was of, about. Raises `ValueError` when they do not fit, or are no sums of squares."""
        features = _features(shape)
        sizes = [one * min(columns, one) for one in features.values()]
        if (squares.shape, sketches.shape) != ((sum(features.values()),), (sum(sizes),)):
            raise ValueError(f"squares of shape {tuple(squares.shape)}, sketches of shape {tuple(sketches.shape)}")
        parts = zip(torch.split(squares, list(features.values())), torch.split(sketches, sizes), strict=True)
        found = {
            name: restore(known, product.view(one, -1), tokens, derive_seed(seed, name))
            for (name, one), (known, product) in zip(features.items(), parts, strict=True)
        }
        return Statistics(shape, fingerprint, "full", found)

    def absorb(self, other: Statistics) -> None:
        """Add another's sums, of the same model and needs."""
        for name, moments in other.sums.items():
            self.sums[name].absorb(moments)

    def _moments(self, index: int, name: str) -> Moments:
        (first,) = (group[0] for group in inputs_of(self.shape.modules) if name in group)
        return self.sums[f"layers.{index}.{first}"]


def collected(
    base: Path,
    tokens: Tensor,
    needs: Needs,
    precision: Precision,
    progress: Progress,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Moments]]:
    """The sums over token ids (samples, length) in the dense model, on `device`, the machine's best if not given.

    Layer by layer: who keeps none of them holds those of one layer.
    """
    model = LayeredModel(base, device or choose_device("auto"))
    shape = shape_of(model.config)
    stream = Stream.start(model, tokens, precision)
    with progress.stage("collect statistics", shape.layers) as advance:
        for index in range(shape.layers):
            with model.layer(index) as layer:
                found = stream.moments(index, layer, needs)
            for group in inputs_of(shape.modules):
                yield f"layers.{index}.{group[0]}", found[group[0]]
            found.clear()
            advance(1)


def collect(
    base: Path,
    fingerprint: str,
    tokens: Tensor,
    needs: Needs,
    precision: Precision,
    progress: Progress,
    device: torch.device | None = None,
) -> Statistics:
    """All that `collected` gives."""
    sums = dict(collected(base, tokens, needs, precision, progress, device))
    return Statistics(shape_of(load_config(base)), fingerprint, needs, sums)


def flat(sums: Iterable[tuple[str, Moments]]) -> Tensor:
    """All sums, one after the other in their order: (`flat_size`,) float32."""
    return torch.cat([moments.packed().cpu() for _, moments in sums])


def sketched(sums: Iterable[tuple[str, Moments]], columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Instead of `flat`, of sums that are `full`: all squares, float32, and all sketches of at most so many
    columns, bfloat16, each in one dimension. Takes one sum at a time.
    """
    squares, products = zip(
        *(sketch(moments, min(columns, len(moments.sum)), derive_seed(seed, name)) for name, moments in sums),
        strict=True,
    )
    return torch.cat(squares), torch.cat([one.flatten() for one in products])


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


def load_statistics(paths: Sequence[Path], shape: Shape, fingerprint: str, needs: Needs = "nothing") -> Statistics:
    """The sum over several clients' files. Raises `LegolmError` as `check_statistics` does, and for broken sums."""
    held = check_statistics(paths, shape, fingerprint, needs)
    files = [_load(path, shape, fingerprint, held) for path in paths]
    for other in files[1:]:
        files[0].absorb(other)
    return files[0]


def check_statistics(paths: Sequence[Path], shape: Shape, fingerprint: str, needs: Needs, where: str = "") -> Needs:
    """What the files have, by their headers.

    Raises `LegolmError`, which begins with `where`, for one that is broken or of another model, and for less than
    `needs`.
    """
    held: list[Needs] = []
    for path in paths:
        with _opened(path, where) as (header, handle):
            if (header["base_fingerprint"], header["shape"]) != (fingerprint, asdict(shape)):
                raise LegolmError(f"{where}calibration.statistics: {path} was collected on another base model")
            held.append("full" if header["needs"] == "full" else "diagonal")
            for name, features in _features(shape).items():
                if handle.get_slice(name).get_shape() != [_size(features, held[-1])] or int(header["tokens"][name]) < 1:
                    raise ValueError(f"sums {name} of another size, or of no tokens")
    if len(set(held)) > 1:
        raise LegolmError(
            f"{where}calibration.statistics: some files are squares only; collect all with the same --needs"
        )
    if needs == "full" and held[0] != "full":
        raise LegolmError(
            f"{where}calibration.statistics: these are squares only, for wanda; run: legolm calibrate --needs full"
        )
    return held[0]


@contextmanager
def _opened(path: Path, where: str = "") -> Iterator[tuple[dict[str, Any], Any]]:
    """The file and what its header says."""
    with open_tensors(path, f"{where}calibration.statistics: ", "collect it again with `legolm calibrate`") as handle:
        yield strict_json((handle.metadata() or {})["legolm"]), handle


def _load(path: Path, shape: Shape, fingerprint: str, needs: Needs) -> Statistics:
    with _opened(path) as (header, handle):
        sums = {
            name: Moments.unpacked(handle.get_tensor(name), int(header["tokens"][name]), features, needs)
            for name, features in _features(shape).items()
        }
    return Statistics(shape, fingerprint, needs, sums)


def _features(shape: Shape) -> dict[str, int]:
    """Of what each group of a layer's modules reads."""
    first = [group[0] for group in inputs_of(shape.modules)]
    return {f"layers.{index}.{name}": shape.matrix(name)[1] for index in range(shape.layers) for name in first}


def _size(features: int, needs: Needs) -> int:
    return features if needs == "diagonal" else features * (features + 1) // 2


def flat_size(shape: Shape, needs: Needs) -> int:
    """Numbers in all sums of a model of this shape."""
    return sum(_size(features, needs) for features in _features(shape).values())


def sent_bytes(shape: Shape, needs: Needs, columns: int | None) -> int:
    """Of all sums of a model of this shape: whole, or as squares and sketches of at most so many columns."""
    if columns is None:
        return 4 * flat_size(shape, needs)
    return sum(4 * features + 2 * features * min(columns, features) for features in _features(shape).values())


def statistics_files(calibration: CalibrationConfig, sums: Path | None) -> list[Path]:
    """What the config names, or the file of what a run's clients collected. Raises `LegolmError` outside of a run."""
    given = calibration.statistics
    if given != CLIENTS:
        return [Path(one) for one in given or ()]
    if sums is None:
        raise LegolmError(
            f"calibration.statistics: {CLIENTS!r} are asked by `legolm run`; here give files of `legolm calibrate`"
        )
    return [sums]
