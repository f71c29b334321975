"""Cut blocks: one pass over the LLM's layers for all of them, then recover each and write it with its manifest."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from legolm.block import Base, Block, Manifest, read_block, write_block
from legolm.config import CLIENTS, CRITERIA, BlockConfig, CalibrationConfig, Precision
from legolm.data import is_bundled, paths_of, prompt_look
from legolm.errors import LegolmError, brief
from legolm.models import (
    CheckpointWriter,
    LayeredModel,
    carry,
    choose_device,
    config_changes,
    count_parameters,
    load_model,
    load_tokenizer,
    save_model,
)
from legolm.prune.calibrate import Stream
from legolm.prune.cuts import Cut, start_cuts
from legolm.prune.recover import Teacher, check_recovery, recover, teacher_of
from legolm.prune.sparsegpt import forget
from legolm.prune.target import planned_coverage
from legolm.system import Progress, atomic_folder, check_room, file_hash, keep_freed_memory

CPU = torch.device("cpu")


@dataclass
class _Job:
    """A block in the making, in a folder that gets its name when `closing` closes."""

    spec: BlockConfig
    cut: Cut
    folder: Path
    writer: CheckpointWriter
    closing: ExitStack
    layers: int = 0


def cut_blocks(
    path: Path,
    fingerprint: str,
    wanted: Sequence[tuple[BlockConfig, Path]],
    seed: int,
    precision: Precision,
    progress: Progress,
    model_name: str | None = None,
    device: torch.device | None = None,
    tokenizer: Any = None,
    sums: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> list[Block]:
    """Cut blocks from the checkpoint at `path` into their folders, each whole or not at all.

    They record `model_name`, or the path, as the LLM that they were cut from, and get `tokenizer`, or the LLM's. What
    is computed is computed on `device`, the machine's best if not given. `sums` is the file of what the run's clients
    collected, where they are asked. `finish` adds to a block's folder before it appears.

    The LLM is read one decoder layer at a time. Blocks with the same calibration share its text and the hidden states
    of the dense model. Raises `LegolmError` for bad targets, text or disks before anything is written.
    """
    began = time.perf_counter()
    device = device or choose_device("auto")
    # MPS has no float64, in which matrices are fitted.
    model = LayeredModel(path, CPU if device.type == "mps" else device)
    base = Base.of(path, fingerprint, model.config)
    tokenizer = tokenizer or load_tokenizer(path)  # a broken one is to show before the work
    weights = sum(base.parameters_of(planned_coverage(spec, base).kept_weights) for spec, _ in wanted)
    check_room(wanted[0][1], weights * base.dtype.itemsize)
    specs = [spec for spec, _ in wanted]
    recipes = [recipe_of(spec, seed, precision, sums) for spec in specs]
    check_recovery(specs, tokenizer, seed, model.config.max_position_embeddings)
    cuts, dense = start_cuts(specs, model, base, tokenizer, seed, precision, progress, sums)
    with ExitStack() as stack:
        jobs = []
        for (spec, out), cut in zip(wanted, cuts, strict=True):
            closing = stack.enter_context(ExitStack())
            folder = closing.enter_context(atomic_folder(out))
            jobs.append(_Job(spec, cut, folder, CheckpointWriter(folder, base.dtype), closing))
        _cut(model, jobs, dense, progress)
        seconds = (time.perf_counter() - began) / len(jobs)
        dense.clear()  # recovery needs the memory
        forget()
        model_name = model_name or str(path.resolve())
        recovering = sum(job.spec.recover.most_steps > 0 for job in jobs)
        with teacher_of(path, precision, device, recovering) as teacher:
            for job, recipe in zip(jobs, recipes, strict=True):
                _finish(job, base, tokenizer, model_name, recipe, seconds, seed, precision, progress, teacher)
                if finish is not None:
                    finish(job.folder)
                job.closing.close()
    return [read_block(out) for _, out in wanted]


def kept_block(
    folder: Path, fingerprint: str, spec: BlockConfig, seed: int, precision: Precision, tokenizer: Any
) -> Block | None:
    """The block in a folder where it is what `cut_blocks` would make there; None where nothing is there.

    Raises `LegolmError` for anything else there, with the first field that differs.
    """
    if not folder.exists():
        return None
    found = read_block(folder)
    was = {"fingerprint": found.base_fingerprint[:12], "method": found.method, **found.details}
    for field, value in {
        "fingerprint": fingerprint[:12],
        "method": spec.method,
        **recipe_of(spec, seed, precision),
    }.items():
        if was.get(field) != value:
            old, new = was.get(field), value
            if isinstance(old, dict) and isinstance(new, dict):  # of a target what differs
                alike = {key for key in old if old[key] == new.get(key)}
                old, new = ({key: own for key, own in one.items() if key not in alike} for one in (old, new))
            raise LegolmError(
                f"{folder} is already there and holds another block: {field} was "
                f"{brief(json.dumps(old))} and is {brief(json.dumps(new))}; give another folder"
            )
    if prompt_look(load_tokenizer(folder)) != prompt_look(tokenizer):
        raise LegolmError(f"{folder} is already there, cut with another chat template; give another folder")
    return found


def recipe_of(spec: BlockConfig, seed: int, precision: Precision, sums: Path | None = None) -> dict[str, Any]:
    """All that a block of this method follows from, beside its LLM: its target, hashes of what it is calibrated on, and
    of a plugin's code.

    `sums` is the file of what a run's clients collected. Raises `LegolmError` for a pattern that no text matches.
    """
    given = spec.calibration.statistics
    files = {file: [Path(file)] for file in given or () if given != CLIENTS}
    if given == CLIENTS and sums is not None:
        files[CLIENTS] = [sums]
    recovers = spec.recover.most_steps > 0
    read = spec.method not in ("dense", "given") and (not given or (recovers and not spec.recover.text))
    texts = (
        ("calibration", spec.calibration.text if read else None),
        ("recover", spec.recover.text if recovers else None),
    )
    for field, text in texts:
        if text and not is_bundled(text) and not text.startswith("hub:"):
            files[text] = paths_of(text, f"block {spec.name}: {field}.text")
    source = CRITERIA.entry(spec.method).source if spec.registered else ""
    return {
        "target": spec.model_dump(mode="json", exclude={"name", "method"}, exclude_none=True),
        "seed": seed,
        "precision": precision,
        "files": {
            name: " ".join(map(file_hash, there))
            for name, paths in files.items()
            if (there := [path for path in paths if path.is_file()])
        },
    } | ({"plugin": source} if source else {})


def _cut(
    model: LayeredModel, jobs: Sequence[_Job], dense: Mapping[CalibrationConfig, Stream], progress: Progress
) -> None:
    """The pass over the layers: each goes through the dense model and then to every block."""
    with progress.stage(f"cut {', '.join(job.spec.name for job in jobs)}", len(model.layers)) as advance:
        for index in range(len(model.layers)):
            # Within a layer only: what it leaves would pile up between the weights of the next ones.
            with model.layer(index) as layer, keep_freed_memory():
                for one in dense.values():
                    one.advance(index, layer)
                for job in jobs:
                    ready = job.cut.step(index, layer, dense.get(job.spec.calibration))
                    if ready is not None:
                        job.writer.add(model.layer_prefix(job.layers), ready.state_dict())
                        job.layers += 1
            advance(1)
    for job in jobs:
        for name, tensor in model.around():
            job.writer.add("", {name: tensor})
        job.writer.close()


def _finish(
    job: _Job,
    base: Base,
    tokenizer: Any,
    model_name: str,
    recipe: dict[str, Any],
    seconds: float,
    seed: int,
    precision: Precision,
    progress: Progress,
    teacher: Teacher | None,
) -> None:
    """Make the folder a checkpoint, recover it, and add the manifest."""
    began = time.perf_counter()
    spec, coverage, folder = job.spec, job.cut.coverage, job.folder
    config = copy.deepcopy(base.config)
    if coverage.block_shape != base.shape:
        config.update(config_changes(config, coverage.block_shape, coverage.layers))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    details = recipe | {"model": model_name}
    if teacher is not None and spec.recover.most_steps:
        model = load_model(folder).to(teacher.device)
        with progress.stage(f"recover {spec.name}", spec.recover.most_steps) as advance:
            details["recover"] = recover(model, coverage, teacher, tokenizer, spec, precision, seed, advance)
        for stale in folder.glob("model*"):
            stale.unlink()
        save_model(model.to(CPU), tokenizer, folder, base.dtype)
    carry(base.path, folder)
    details["seconds"] = seconds + time.perf_counter() - began
    sparsity, coverage = coverage.sparsity, coverage.unmasked() if spec.adapter == "plain" else coverage
    manifest = Manifest(
        name=spec.name,
        method=spec.method,
        base_fingerprint=base.fingerprint,
        coverage_hash=coverage.hash,
        parameters=count_parameters(folder),
        sparsity=sparsity,
        details=details,
    )
    write_block(manifest, coverage, folder)
