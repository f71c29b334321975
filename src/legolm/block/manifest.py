"""A block on disk: a Hugging Face checkpoint, `coverage.safetensors` and `manifest.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from legolm.block.block import Block
from legolm.block.coverage import Coverage, load_coverage, save_coverage
from legolm.errors import LegolmError
from legolm.models import carry, count_parameters, folder_bytes, load_config, place_weights, shape_of
from legolm.system import link, read_bounded, unreadable


class Manifest(BaseModel):
    """What `manifest.json` holds; anything else is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_number: Literal[1] = 1
    name: str
    method: str
    base_fingerprint: str
    coverage_hash: str
    parameters: int
    sparsity: float
    details: dict[str, Any] = {}


def write_block(manifest: Manifest, coverage: Coverage, path: Path) -> None:
    """Add manifest and coverage to a checkpoint folder."""
    save_coverage(coverage, path / "coverage.safetensors")
    (path / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def write_llm(base: Path, base_fingerprint: str, tokenizer: Any, path: Path) -> None:
    """The LLM as a block's folder, which a device can fetch: each time the same files, its weights a second name of
    theirs where the file system has one.
    """
    block = llm_block(base, base_fingerprint)
    place_weights(base, path, link)
    load_config(base).save_pretrained(path)
    tokenizer.save_pretrained(path)
    carry(base, path)
    named = {"name": block.name, "method": block.method, "base_fingerprint": base_fingerprint}
    counted = {"coverage_hash": block.coverage.hash, "parameters": block.parameters, "sparsity": block.sparsity}
    write_block(Manifest.model_validate(named | counted), block.coverage, path)


def rename_block(path: Path, name: str) -> None:
    """Give the block in a folder another name. A second name that its manifest has elsewhere keeps the old content."""
    manifest, file = _read_manifest(path), path / "manifest.json"
    file.unlink()
    file.write_text(manifest.model_copy(update={"name": name}).model_dump_json(indent=2) + "\n", encoding="utf-8")


def without_places(details: Any) -> Any:
    """A manifest's details, or a part of them, with the names of files and folders in the place of whole paths: for
    others, who have not this machine's.
    """
    if isinstance(details, Mapping):
        return {without_places(key): without_places(value) for key, value in details.items()}
    if isinstance(details, list):
        return [without_places(value) for value in details]
    return Path(details).name if isinstance(details, str) and Path(details).is_absolute() else details


def hide_places(path: Path) -> None:
    """Take the paths of this machine out of the manifest in a folder."""
    manifest = _read_manifest(path)
    shown = manifest.model_copy(update={"details": without_places(manifest.details)})
    (path / "manifest.json").write_text(shown.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_block(path: Path) -> Block:
    """Read a block folder. Raises `LegolmError` when a file is missing, broken or does not fit the others."""
    manifest = _read_manifest(path)
    coverage = load_coverage(path / "coverage.safetensors")
    if coverage.hash != manifest.coverage_hash:
        raise LegolmError(f"block {path}: coverage.safetensors is not the one of its manifest; cut the block again")
    if (path / "config.json").exists() and shape_of(load_config(path)) != coverage.block_shape:
        raise LegolmError(f"block {path}: config.json has another shape than coverage.safetensors; cut the block again")
    return Block(
        name=manifest.name,
        path=path,
        method=manifest.method,
        coverage=coverage,
        base_fingerprint=manifest.base_fingerprint,
        parameters=manifest.parameters,
        sparsity=manifest.sparsity,
        file_bytes=folder_bytes(path),
        details=manifest.details,
    )


def llm_block(path: Path, base_fingerprint: str) -> Block:
    """The LLM itself as the block `llm` with full coverage."""
    shape = shape_of(load_config(path))
    return Block(
        "llm", path, "dense", Coverage.full(shape), base_fingerprint, count_parameters(path), 0.0, folder_bytes(path)
    )


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(read_bounded(path / "manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise LegolmError(f"block {path}: no manifest.json; give a folder that `legolm prune` wrote") from None
    except OSError as error:
        raise unreadable(f"block {path}: manifest.json", error) from None
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise LegolmError(f"block {path}: manifest.json is broken ({reason}); cut the block again") from None
