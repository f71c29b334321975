"""Compose: read one decoder layer of the target's weights at a time, add what the sources learned, write it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from legolm.block import Base, Block, Coverage, Manifest, read_block, slice_matrix, write_block
from legolm.composition.methods import Method, Part
from legolm.composition.sources import Source, given_weights, read_sources, weights_by_examples, weights_by_loss
from legolm.composition.target import covered_weights, held, masked_like, parse_sizes, shaped, target_block
from legolm.config import RowsConfig
from legolm.data import prompt_look, take_look
from legolm.errors import LegolmError
from legolm.models import (
    CheckpointWriter,
    LayeredModel,
    carry,
    config_changes,
    count_parameters,
    find_fingerprint,
    lasting_name,
    load_config,
    load_tokenizer,
    resolve,
    rounded,
)
from legolm.system import Progress, atomic_folder, check_new

LONGEST_NAME = 255
"""Of a folder: what is longer names none, and asking for it is an error."""


@dataclass(frozen=True)
class Composition:
    """What will be composed. The target's weights are those of `base`, a block's checkpoint or the LLM's.

    `whole`: `base` is the target itself; else it is the LLM, which the target is sliced out of. `model` is what finds
    the LLM, if known. Weights have mean 1.
    `covered` counts the target's linear weights that some source holds.
    """

    sources: list[Source]
    weights: list[float]
    method: Method
    coverage: Coverage
    base: Base
    model: str | None
    whole: bool
    covered: int

    @property
    def config(self) -> Any:
        """Of the composed model."""
        config = copy.deepcopy(self.base.config)
        if not self.whole and self.coverage.block_shape != self.base.shape:
            config.update(config_changes(config, self.coverage.block_shape, self.coverage.layers))
        return config


def plan(
    names: Sequence[str],
    into: str,
    base: str | None,
    method: Method,
    weights: str | None,
    validate: str | None,
    progress: Progress,
    rows: RowsConfig | None = None,
    check: Callable[[Composition], None] = lambda _: None,
) -> Composition:
    """Read and check everything; with `validate` also evaluate the sources. Raises `LegolmError` for bad input.

    `into` is `llm`, `union`, sizes, or a block's folder; `base` the LLM, which runs record in their final folders.
    `rows`: how those of `validate` are read. `check` sees what is to be composed, of equal weights, before any is
    evaluated.
    """
    if weights is not None and validate is not None:
        raise LegolmError("--weights and --validate: give one of them")
    sources = read_sources(names)
    if method.needs_one_start and (sources[0].start is None or len({source.start for source in sources}) > 1):
        raise LegolmError(
            "--form factor: the sources did not start from one adapter (or nobody knows); take --form exact, or "
            "blocks of one run"
        )
    coverages = [source.block.coverage for source in sources]
    model: str | None
    if into in ("llm", "union") or ("=" in into and (len(into) > LONGEST_NAME or not Path(into).is_dir())):
        model, found = _base(base, sources)
        if into == "llm":
            coverage = Coverage.full(found.shape)
        else:
            coverage = shaped(coverages, found, parse_sizes(into) if into != "union" else None)
            coverage = masked_like(coverage, coverages) if into == "union" else coverage
        whole = into == "llm"
    else:
        if base is not None:
            raise LegolmError(f"--base {base}: {into} has its own weights; leave it out")
        target = _target(into, sources[0].block)
        model = target.details.get("model")
        found, coverage, whole = (
            Base.of(target.path, target.base_fingerprint, load_config(target.path)),
            target.coverage,
            True,
        )
    covered = covered_weights(coverage, coverages)
    composed = Composition(sources, [1.0] * len(sources), method, coverage, found, model, whole, covered)
    check(composed)
    if weights is not None:
        numbers = given_weights(weights, sources)
    elif validate is not None:
        numbers = weights_by_loss(sources, validate, progress, rows or RowsConfig())
    else:
        numbers = weights_by_examples(sources)
    mean = sum(numbers) / len(numbers)
    return replace(composed, weights=[one / mean for one in numbers])


def compose(wanted: Composition, out: Path, progress: Progress) -> Block:
    """Write the composed model: a checkpoint with manifest and coverage. Raises `LegolmError`, also for an
    `out` that is there, and leaves nothing then.

    One decoder layer is in memory at a time, and the changes of one matrix.
    """
    coverage, base = wanted.coverage, wanted.base
    model, tokenizer = LayeredModel(base.path), load_tokenizer(base.path)
    _take_template(tokenizer, wanted.sources, progress)
    dense = replace(coverage, masks={}).kept_weights
    check_new(out, (base.parameters if wanted.whole else base.parameters_of(dense)) * base.dtype.itemsize)
    with atomic_folder(out) as folder:
        writer = CheckpointWriter(folder, base.dtype)
        with progress.stage("compose", len(coverage.layers)) as advance:
            for j, layer in enumerate(coverage.layers):
                with model.layer(j if wanted.whole else layer) as module:
                    writer.add(model.layer_prefix(j), _layer(wanted, layer, module))
                advance(1)
        for name, tensor in model.around():
            writer.add("", {name: tensor})
        writer.close()
        wanted.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        carry(base.path, folder)
        manifest = Manifest(
            name=out.name,
            method="composed",
            base_fingerprint=wanted.sources[0].block.base_fingerprint,
            coverage_hash=coverage.hash,
            parameters=count_parameters(folder),
            sparsity=coverage.sparsity,
            details={
                "composed": {
                    source.name: weight for source, weight in zip(wanted.sources, wanted.weights, strict=True)
                },
                "by": {"method": wanted.method.name, **wanted.method.settings},
            }
            | ({"model": wanted.model} if wanted.model else {}),
        )
        write_block(manifest, coverage, folder)
    return read_block(out)


def _take_template(tokenizer: Any, sources: Sequence[Source], progress: Progress) -> None:
    """Prompts look as the sources were trained on; as the first was, where they differ, which is said."""
    # What composing needs of a source is no checkpoint.
    whole = [source for source in sources if (source.block.path / "tokenizer_config.json").is_file()]
    looks = [prompt_look(load_tokenizer(source.block.path)) for source in whole]
    if not looks:
        return
    take_look(tokenizer, looks[0])
    other = next((source.name for source, look in zip(whole, looks, strict=True) if look != looks[0]), None)
    if other is not None:
        progress.note(
            f"{other} was trained with another chat template or date than {whole[0].name}, whose goes with the "
            "composed model"
        )


def _layer(wanted: Composition, layer: int, own: nn.Module) -> dict[str, Tensor]:
    """The target's tensors of an LLM layer: M ∘ (W + change), rounded so that small changes stay (`rounded`)."""
    coverage = wanted.coverage
    state: dict[str, Tensor] = own.state_dict()
    for seed, module in enumerate(coverage.shape.modules, start=layer * len(coverage.shape.modules)):
        name, bias = f"{module}.weight", f"{module}.bias"
        weight: Tensor = own.get_parameter(name).data
        if not wanted.whole:
            rows = coverage.rows(layer, module)
            weight = slice_matrix(coverage, layer, module, weight)
            if bias in state and rows is not None:
                state[bias] = state[bias][rows]
        change = _change(wanted, layer, module)
        if change is not None:
            weight = weight + slice_matrix(coverage, layer, module, change).float()
        mask = coverage.mask(layer, module)
        if mask is not None:
            weight = weight * mask
        if not bool(weight.isfinite().all()):
            raise LegolmError(
                f"{wanted.base.path}: {name} of layer {layer} is not finite with what was learned in it; lower scaling"
            )
        weight = rounded(weight, wanted.base.dtype, seed)
        state[name] = weight.T if coverage.shape.entry.transposed else weight
    return state


def _change(wanted: Composition, layer: int, module: str) -> Tensor | None:
    """What the sources that hold the matrix learned, in the LLM's coordinates; zero where none holds an entry."""
    parts = []
    for source, weight in zip(wanted.sources, wanted.weights, strict=True):
        key = f"layers.{layer}.{module}"
        if f"{key}.A" in source.factors:
            own = _one_matrix(source.block.coverage, layer, module)
            parts.append(Part(own, layer, module, source.factors[f"{key}.A"], source.factors[f"{key}.B"], weight))
    if not parts:
        return None
    return torch.where(held([part.coverage for part in parts], layer, module), wanted.method.combine(parts), 0.0)


def _one_matrix(coverage: Coverage, layer: int, module: str) -> Coverage:
    """The coverage of one layer alone, with one matrix's mask."""
    j, mask = coverage.layers.index(layer), coverage.mask(layer, module)
    masks = {} if mask is None else {f"layers.{layer}.{module}": mask}
    return replace(coverage, layers=(layer,), groups=(coverage.groups[j],), neurons=(coverage.neurons[j],), masks=masks)


def _base(given: str | None, sources: Sequence[Source]) -> tuple[str, Base]:
    """Name and checkpoint of the LLM that the sources were cut from: `given`, or one that they record.

    Raises `LegolmError` when none of these is it.
    """
    wanted = sources[0].block.base_fingerprint
    recorded = [name for source in sources if isinstance(name := source.block.details.get("model"), str)]
    if given is not None:
        resolve(given)  # says why if it cannot be found
    name, seen = find_fingerprint(wanted, recorded if given is None else [given])
    if name is not None:
        path = resolve(name)
        return lasting_name(name), Base.of(path, wanted, load_config(path))
    if given is not None:
        raise LegolmError(
            f"--base {given}: is not the LLM that the blocks were cut from (fingerprint {seen[given][:12]}, theirs "
            f"{wanted[:12]}); give that one"
        )
    raise LegolmError("--base: the sources record no LLM that is here and is what they were cut from; give it")


def _target(into: str, source: Block) -> Block:
    if not Path(into).is_dir():
        raise LegolmError(
            f"--into {into}: must be llm, union, sizes (layers=30,kv_groups=3,neurons=1536) or a block's folder"
        )
    target = target_block(Path(into))
    if target.base_fingerprint != source.base_fingerprint:
        raise LegolmError(f"--into {into}: was cut from another base model than the sources; take a block of theirs")
    return target
