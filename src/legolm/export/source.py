"""What is exported: a block, an LLM or a run's final model, with an adapter or without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from legolm.adapter import FACTORS, Tensors, adapter_config, check_factors, load_factors, merge, read_adapter
from legolm.block import Block, Coverage, llm_block, read_block
from legolm.composition import Composition
from legolm.errors import LegolmError
from legolm.models import (
    carry,
    find_fingerprint,
    find_model,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
)
from legolm.runs import RunDir, run_of
from legolm.system import read_bounded, scratch_folder

SIDE_FILES = ("manifest.json", "coverage.safetensors")


@dataclass(frozen=True)
class Source:
    """A model to export. `folder` is its checkpoint; an `adapter` is not merged there, `learned` is what was.

    `block` is the LLM with full coverage where the folder is no block's, `config` the checkpoint's. `scratch` is for
    what is made on the way.
    """

    name: str
    folder: Path
    block: Block
    adapter: Tensors | None
    scratch: Path
    config: Any

    @property
    def coverage(self) -> Coverage:
        """What of the LLM it holds."""
        return self.block.coverage

    @property
    def is_block(self) -> bool:
        """Whether it was cut, and has a manifest."""
        return (self.folder / "manifest.json").is_file()

    @property
    def is_cut(self) -> bool:
        """Whether it was cut: what it learned goes on other weights than the LLM's."""
        part = self.coverage.hash != Coverage.full(self.coverage.shape).hash
        return part or self.block.method not in ("dense", "composed")  # a plain adapter covers all, beside zeros

    @property
    def learned(self) -> bool:
        """Whether an adapter is merged, here or by the run that wrote it."""
        return self.adapter is not None or (self.folder / FACTORS).is_file()

    @cached_property
    def path(self) -> Path:
        """Checkpoint with everything merged."""
        if self.adapter is None:
            return self.folder
        out = self.scratch / "merged"
        model, dtype = load_model(self.folder), load_config(self.folder).dtype or torch.float32
        merge(model, self.coverage, self.adapter, 1.0)
        out.mkdir()
        save_model(model, load_tokenizer(self.folder), out, dtype)
        carry(self.folder, out)
        for name in SIDE_FILES:
            if (self.folder / name).is_file():
                shutil.copy2(self.folder / name, out / name)
        return out

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return load_tokenizer(self.folder)

    def load(self) -> Any:
        """The model with everything merged, float32 on the CPU."""
        return load_model(self.path)

    @cached_property
    def factors(self) -> Tensors:
        """What it learned, with the scale in B. Raises `LegolmError` where that is not known."""
        if self.adapter is not None:
            return self.adapter
        if not (self.folder / FACTORS).is_file():
            raise LegolmError(
                f"{self.name}: has no adapter; give one (--adapter DIR), or a run's final model (RUN:CLIENT)"
            )
        return load_factors(self.folder)[0]

    @cached_property
    def bare(self) -> Path:
        """Checkpoint that `factors` go on. Raises `LegolmError` when it is not here any more."""
        if self.adapter is not None:
            return self.folder
        run = run_of(self.folder) or RunDir(self.folder.resolve().parent.parent)
        if (run.block(self.block.name) / "manifest.json").is_file():
            bare = read_block(run.block(self.block.name))
            if bare.coverage.hash == self.coverage.hash:
                return bare.path
        recorded = self.block.details.get("model")
        found, _ = find_fingerprint(self.block.base_fingerprint, [recorded] if isinstance(recorded, str) else [])
        if found is None or self.is_cut:
            raise LegolmError(
                f"{self.name}: the block that its adapter belongs to is not in {run.path / 'blocks'} any more"
            )
        return resolve(found)

    @cached_property
    def licence(self) -> str | None:
        """Of the LLM, as its model card or the starter's says it; None where nobody does."""
        recorded = self.block.details.get("model")
        for name in (self.folder, recorded):
            if name == "starter":
                return "apache-2.0"
            if (found := _licence(name)) is not None:
                return found
        return None


@contextmanager
def open_source(name: str, adapter: Path | None, beside: Path) -> Iterator[Source]:
    """The model of this name. What is made on the way lies beside `beside` and vanishes.

    Raises `LegolmError` where there is none, for an adapter that does not fit, and for one of a checkpoint that has
    learned something already.
    """
    folder = find_model(name)
    config = load_config(folder)
    block = read_block(folder) if (folder / "manifest.json").is_file() else llm_block(folder, "")
    if not (folder / "manifest.json").is_file():
        block = replace(block, details={"model": name})
    factors = None if adapter is None else _adapter(adapter, name, folder, block)
    with scratch_folder(beside) as scratch:
        yield Source(name, folder, block, factors, scratch, config)


def composed_source(wanted: Composition, out: Path, adapter: Path | None) -> Source:
    """What will be composed into `out`, before its weights are there. Raises `LegolmError` for an adapter that does not
    fit.
    """
    base, coverage = wanted.base, wanted.coverage
    size = base.parameters_of(replace(coverage, masks={}).kept_weights)
    block = Block(out.name, out, "composed", coverage, base.fingerprint, size, coverage.sparsity, 0)
    factors = None
    if adapter is not None:
        factors = read_adapter(adapter, coverage, f"--adapter {adapter}")
        check_factors(f"--adapter {adapter}", factors, coverage)
    return Source(str(out), base.path, block, factors, out, wanted.config)


def _adapter(path: Path, name: str, folder: Path, block: Block) -> Tensors:
    where = f"--adapter {path}"
    if (folder / FACTORS).is_file():
        raise LegolmError(
            f"{where}: {name} has what it learned merged already; leave it out, or give the block as it was cut"
        )
    recorded = adapter_config(path, where).get("base_model_name_or_path")
    factors = read_adapter(path, block.coverage, where)
    check_factors(where, factors, block.coverage)
    if (
        isinstance(recorded, str)
        and (Path(recorded) / "config.json").is_file()
        and Path(recorded).resolve() != folder.resolve()
        and fingerprint(Path(recorded)) != fingerprint(folder)
    ):
        raise LegolmError(f"{where}: was trained on {recorded}, which has other weights than {name}; give that one")
    return factors


def _licence(model: object) -> str | None:
    """What the front matter of a checkpoint's README.md says."""
    if not isinstance(model, str | Path):
        return None
    try:
        folder = resolve(str(model))
        text = read_bounded(folder / "README.md", 1 << 20).decode(errors="replace")
    except (LegolmError, OSError):
        return None
    _, _, rest = text.partition("---\n")
    for line in rest.partition("\n---")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "license" and value.strip():
            return value.strip().strip("'\"")
    return None
