"""From block configs to cuts ready to take the LLM's layers: their calibration, and the shape that each may keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from legolm.block import Base, Coverage
from legolm.config import CLIENTS, BlockConfig, CalibrationConfig, Precision
from legolm.data import calibration_tokens
from legolm.models import LayeredModel, Shape, Unit
from legolm.prune import magnitude, sparsegpt, wanda  # noqa: F401 (they register themselves)
from legolm.prune.allocate import SAMPLES, Costs, choose, measure_costs
from legolm.prune.calibrate import Source, Stream
from legolm.prune.moments import Needs
from legolm.prune.registry import criterion_of
from legolm.prune.speed import shape_for
from legolm.prune.statistics import load_statistics, statistics_files
from legolm.prune.structured import StructuredCut
from legolm.prune.target import given_shape, shapes_within, target_pattern, window_coverage
from legolm.prune.unstructured import UnstructuredCut
from legolm.prune.window import WindowCut
from legolm.system import Progress


class Cut(Protocol):
    """A block in the making."""

    @property
    def coverage(self) -> Coverage:
        """What the block kept."""

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module | None:
        """Take the LLM's layer `index`; give the block's next layer when it is ready."""


class WholeCut:
    """The block that is the LLM itself."""

    def __init__(self, shape: Shape) -> None:
        self.coverage = Coverage.full(shape)

    def step(self, index: int, layer: nn.Module, dense: Stream | None) -> nn.Module:
        """The layer as it is."""
        return layer


def start_cuts(
    specs: Sequence[BlockConfig],
    model: LayeredModel,
    base: Base,
    tokenizer: Any,
    seed: int,
    precision: Precision,
    progress: Progress,
    sums: Path | None = None,
) -> tuple[list[Cut], dict[CalibrationConfig, Stream]]:
    """The cuts in the order of `specs`, and the dense model's hidden states for each calibration that needs them.

    Raises `LegolmError` for targets that cannot be met and for text that is missing or too short.
    """
    for spec in specs:
        _check(spec, base)
    cuts: dict[str, Cut] = {}
    dense: dict[CalibrationConfig, Stream] = {}
    for calibration in dict.fromkeys(spec.calibration for spec in specs):
        users = [spec for spec in specs if spec.calibration == calibration]
        reading = [spec for spec in users if needs_of(spec) != "nothing"]
        sources: dict[str, Source] = {}
        shapes: dict[str, tuple[Shape, tuple[int, ...]]] = {}
        if reading and calibration.statistics:
            needs: Needs = "full" if any(needs_of(spec) == "full" for spec in reading) else "diagonal"
            paths = statistics_files(calibration, sums)
            found = load_statistics(paths, base.shape, base.fingerprint, needs)
            sources = dict.fromkeys((s.name for s in reading), found)
            every = tuple(range(base.shape.layers))
            shapes = {s.name: (given_shape(s, base) or base.shape, every) for s in reading}
        elif reading:
            text = _Text(calibration, model, base, tokenizer, seed, precision, progress)
            shapes = {spec.name: text.shape(spec) for spec in reading if spec.method == "structured"}
            streams = text.streams(len(reading) + bool(shapes))
            sources = {spec.name: stream for spec, stream in zip(reading, streams, strict=False)}
            if shapes:
                dense[calibration] = streams[-1]
        for spec in users:
            cuts[spec.name] = _cut(spec, base, shapes, sources.get(spec.name))
    return [cuts[spec.name] for spec in specs], dense


def _cut(
    spec: BlockConfig, base: Base, shapes: Mapping[str, tuple[Shape, tuple[int, ...]]], source: Source | None
) -> Cut:
    if spec.method == "dense":
        return WholeCut(base.shape)
    if spec.method == "window":
        return WindowCut(window_coverage(spec, base))
    if spec.method == "structured":
        assert source is not None
        return StructuredCut(base.shape, *shapes[spec.name], base.config, source)
    criterion = criterion_of(spec)
    assert criterion is not None
    return UnstructuredCut(base.shape, criterion, target_pattern(spec, base.shape), source)


def _check(spec: BlockConfig, base: Base) -> None:
    """Raise `LegolmError` for a target that cannot be met, before any work."""
    if criterion_of(spec) is not None:
        target_pattern(spec, base.shape)
    elif spec.method == "window":
        window_coverage(spec, base)
    elif spec.method == "structured" and not spec.speedup:
        _ = given_shape(spec, base) or shapes_within(spec, base)


def needs_of(spec: BlockConfig) -> Needs:
    """What its cut reads of the second moments of the linear layers' inputs."""
    if spec.method == "structured":
        return "full"
    criterion = criterion_of(spec)
    return "nothing" if criterion is None else criterion.needs


def clients_needs(specs: Sequence[BlockConfig]) -> Needs:
    """The most that the cuts of these blocks read of what a run asks its clients for; nothing where it asks none."""
    found = {needs_of(spec) for spec in specs if spec.calibration.statistics == CLIENTS}
    asked: tuple[Needs, ...] = ("full", "diagonal")
    return next((needs for needs in asked if needs in found), "nothing")


def clients_sketch(specs: Sequence[BlockConfig], shape: Shape) -> int | None:
    """Columns of the sketches in which a run's clients send their sums; None where these go whole.

    They do where squares are enough, and where a sketch would be no smaller.
    """
    asked = next((spec.calibration.sketch for spec in specs if spec.calibration.statistics == CLIENTS), None)
    if asked is None or clients_needs(specs) != "full":
        return None
    widest = max(shape.matrix(name)[1] for name in shape.modules)
    return asked if asked < widest else None


class _Text:
    """Calibration text, and what several blocks share of it."""

    def __init__(
        self,
        calibration: CalibrationConfig,
        model: LayeredModel,
        base: Base,
        tokenizer: Any,
        seed: int,
        precision: Precision,
        progress: Progress,
    ) -> None:
        self._model, self._base, self._precision, self._progress = model, base, precision, progress
        self._tokens = calibration_tokens(calibration, tokenizer, seed)
        self._costs: dict[bool, Costs] = {}

    def streams(self, count: int) -> list[Stream]:
        """As many streams from the first layer on."""
        first = Stream.start(self._model, self._tokens, self._precision)
        return [first, *(first.fork() for _ in range(count - 1))]

    def shape(self, spec: BlockConfig) -> tuple[Shape, tuple[int, ...]]:
        """The shape of a structured block and the LLM layers that it keeps."""
        base = self._base
        small = given_shape(spec, base)
        if small is None:

            def best(kept: Callable[[int], float] | None) -> Shape:
                shapes = shapes_within(spec, base, kept)
                return shapes[0] if len(shapes) == 1 else choose(shapes, self._measured(units=True))

            small = shape_for(base, spec.speedup, best, spec.name) if spec.speedup else best(None)
        if small.layers == base.shape.layers:
            return small, tuple(range(small.layers))
        return small, self._measured(units=False).kept_layers(small.layers)

    def _measured(self, units: bool) -> Costs:
        """What cuts cost, measured once on a part of the text."""
        if True in self._costs:
            return self._costs[True]
        if units not in self._costs:
            stream = Stream.start(self._model, self._tokens[:SAMPLES], self._precision)
            wanted: tuple[Unit, ...] = ("query", "neuron") if units else ()
            with self._progress.stage("measure what cuts cost", self._base.shape.layers) as advance:
                self._costs[units] = measure_costs(self._model, self._base.shape, stream, wanted, advance)
        return self._costs[units]
