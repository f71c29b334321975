"""Find, load, save and fingerprint models. Only safetensors are read; no remote code is run."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from legolm.errors import LegolmError
from legolm.models.family import decoder_layers, family_of
from legolm.models.finite import check_files, check_finite, finite
from legolm.models.rounding import rounded
from legolm.models.starter import starter_path
from legolm.system import hub_answers, wants_offline

transformers_logging.disable_progress_bar()

OURS = ("coverage.safetensors", "factors.safetensors")
"""Files in a block's folder that are no part of the checkpoint."""


def resolve(model: str) -> Path:
    """Local folder of `starter`, a folder or a hub id (downloaded once). Raises `LegolmError` if there is none."""
    if model == "starter":
        return starter_path()
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LegolmError(f"model: folder {model} has no config.json; give a Hugging Face checkpoint")
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LegolmError(
            f"model: {model!r} is neither `starter`, a folder with a checkpoint, nor a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    offline = wants_offline() or not hub_answers()
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the hub client raises a dozen kinds: not found, gated, network
        reason = str(error).strip().splitlines()[0]
        if offline:
            reason = "HF_HUB_OFFLINE is set" if wants_offline() else "it does not answer"
            reason = f"{reason}, and no earlier download is here"
        raise LegolmError(f"model: {model!r} cannot be had from the hub ({reason}); give a local folder") from None


def find_fingerprint(wanted: str, models: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """The first of the models that has this fingerprint, if any, and those of all that were looked at.

    A model that is not here is passed over. Raises `LegolmError` for one whose weights cannot be read.
    """
    seen: dict[str, str] = {}
    for model in dict.fromkeys(models):
        try:
            path = resolve(model)
        except LegolmError:
            continue
        seen[model] = fingerprint(path)
        if seen[model] == wanted:
            return model, seen
    return None, seen


def lasting_name(model: str) -> str:
    """What finds the model from any folder: `starter` and hub ids as they are, a folder as its whole path."""
    return str(Path(model).resolve()) if model != "starter" and Path(model).is_dir() else model


def load_config(path: Path) -> Any:
    """The checkpoint's config."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise LegolmError(f"model: {path} has no readable config ({str(error).splitlines()[0]})") from None


def load_model(path: Path, linears: torch.dtype = torch.float32) -> Any:
    """The causal LM in float32 on the CPU, in eval mode, nothing trainable.

    `linears` is the dtype that the decoder's linear weights are kept in: what bf16 autocast would make of them at each
    step anyway, at half the memory.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise LegolmError(f"model: {path} cannot be loaded ({str(error).splitlines()[0]})") from None
    if not all(finite(parameter) for parameter in model.parameters()):
        check_files(weight_files(path))  # knows their names on disk
        raise LegolmError(f"model: {path}: its weights are not finite in float32; take another checkpoint")
    model.requires_grad_(False)
    modules = family_of(model.config).modules
    for layer in decoder_layers(model):
        for module in modules:
            layer.get_submodule(module).to(linears)
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer; padding falls back to the end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise LegolmError(f"model: {path} has no readable tokenizer ({str(error).splitlines()[0]})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: Any, tokenizer: Any, path: Path, dtype: torch.dtype) -> None:
    """Write a normal checkpoint in `dtype`. The model in memory takes that dtype too: it is the end of it.

    Rounding is stochastic (`rounded`), so that small changes of the weights are not lost.
    """
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = rounded(parameter.data, dtype, seed)
    model.to(dtype)  # buffers
    model.config.use_cache = True
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def fingerprint(path: Path) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a checkpoint's weights, in the order of names.

    Raises `LegolmError` for a weight that is not finite: whoever stands on these weights should know it first.
    """
    digest = hashlib.sha256()
    entries: list[tuple[str, Path]] = []
    for file in weight_files(path):
        with safe_open(file, framework="pt") as handle:
            entries += [(name, file) for name in handle.keys()]  # noqa: SIM118 (not a dict)
    if not entries:
        raise LegolmError(f"model: {path} holds no safetensors weights; save it with save_pretrained")
    for name, file in sorted(entries):
        with safe_open(file, framework="pt") as handle:
            tensor = handle.get_tensor(name)
        check_finite(name, tensor, file)
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def count_parameters(path: Path) -> int:
    """Parameters stored in a checkpoint's weight files; tied ones are stored, and counted, once."""
    total = 0
    for file in weight_files(path):
        with safe_open(file, framework="pt") as handle:
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
    return total


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint's weights."""
    return sorted(file for file in path.glob("*.safetensors") if file.name not in OURS)


def check_weights(path: Path) -> None:
    """Read a checkpoint's weights. Raises `LegolmError` for one that is not finite, with its name and file."""
    check_files(weight_files(path))


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(Path(root, name).stat().st_size for root, _, names in os.walk(path) for name in names)
