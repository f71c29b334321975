"""Find, load, save and fingerprint models. Only safetensors are read; no remote code is run."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from legolm.config import DataConfig
from legolm.data import set_template
from legolm.errors import LegolmError, brief
from legolm.models.beside import CARRIED, check_own
from legolm.models.checkpoint import (
    SAVE_AGAIN,
    as_transformers_reads,
    drop_code,
    drop_sampling,
    ggufs_in,
    is_gguf,
    load_config,
    place_weights,
    stored_weights,
    weight_files,
)
from legolm.models.family import decoder_layers, family_of
from legolm.models.finite import check_files, check_finite, finite
from legolm.models.rotary import by_own_length
from legolm.models.rounding import rounded
from legolm.models.starter import starter_path
from legolm.models.transposed import as_linears
from legolm.runs import RunDir, check_sealed
from legolm.system import hub_answers, open_tensors, reading, wants_offline

transformers_logging.disable_progress_bar()

SIDE_FILES = re.compile(
    r"(config|generation_config|.*token.*|vocab|manifest)\.json|.*\.jinja|merges\.txt|coverage\.safetensors"
)
TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*", "usage_policy*")
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", *TERMS, *map(str.upper, TERMS)]
UNWANTED = ["consolidated*", "original/*", "onnx/*"]
"""Files of a hub's model: what is read or carried, and not the same weights once more in another form."""
MAX_TOKENIZER = 256 << 20
"""Bytes of a tokenizer's file: eight times those of the largest."""


def resolve(model: str) -> Path:
    """Local folder of `starter`, a folder or a hub id (downloaded once). Raises `LegolmError` if there is none."""
    if model == "starter":
        return starter_path()
    path = Path(model)
    with reading(f"model: {model}"):
        folder, config = path.is_dir(), path / "config.json"
        if is_gguf(path) and not path.exists():
            raise LegolmError(f"model: no file {model}; give a GGUF file, or a folder with a checkpoint")
        if is_gguf(path) or (folder and not config.exists() and ggufs_in(path)):
            raise LegolmError(
                f"model: {model} is a GGUF file; run: legolm import {quote(model)} --out DIR, and give DIR"
            )
        if folder and not config.is_file():
            raise LegolmError(f"model: folder {model} has no config.json; give a Hugging Face checkpoint")
    if folder:
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LegolmError(
            f"model: {model!r} is neither `starter`, a folder with a checkpoint, nor a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    offline = wants_offline() or not hub_answers()
    try:
        return Path(snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=offline))
    except Exception as error:  # the hub client raises a dozen kinds: not found, gated, network
        reason = brief(error)
        if offline:
            reason = "HF_HUB_OFFLINE is set" if wants_offline() else "it does not answer"
            reason = f"{reason}, and no earlier download is here"
        raise LegolmError(f"model: {model!r} cannot be had from the hub ({reason}); give a local folder") from None


def find_model(name: str) -> Path:
    """Folder of `RUN:CLIENT` (what the client ended with; `RUN:llm`), of a folder, of `starter` or a hub id.

    Raises `LegolmError` where there is none, and for a final model that is not what the run wrote.
    """
    run, _, client = name.rpartition(":")
    if run and not Path(name).exists() and Path(run).is_dir():
        path = RunDir(Path(run)).final_model(client)
        check_sealed(path)
        return path
    if "/" in run and not Path(name).exists():  # no hub has a model of this name
        raise LegolmError(f"{name}: there is no run folder {run}; give RUN:CLIENT, a folder, `starter` or a hub id")
    if Path(name).is_dir() and not (Path(name) / "config.json").exists() and RunDir(Path(name)).exists():
        RunDir(Path(name)).final_model("")  # says what there is
    return resolve(name)


def find_fingerprint(wanted: str, models: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """The first of the models that has this fingerprint, if any, and those of all that were looked at.

    A model that is not here is passed over. Raises `LegolmError` for one whose weights cannot be read.
    """
    seen: dict[str, str] = {}
    for model in dict.fromkeys(models):
        try:
            path = find_model(model)
        except LegolmError:
            continue
        seen[model] = fingerprint(path)
        if seen[model] == wanted:
            return model, seen
    return None, seen


def lasting_name(model: str) -> str:
    """What finds the model from any folder: `starter` and hub ids as they are, a folder as its whole path."""
    return str(Path(model).resolve()) if model != "starter" and Path(model).is_dir() else model


def load_model(path: Path, linears: torch.dtype = torch.float32) -> Any:
    """The causal LM in float32 on the CPU, in eval mode, nothing trainable.

    `linears` is the dtype that the decoder's linear weights are kept in: what bf16 autocast would make of them at each
    step anyway, at half the memory.
    """
    config = load_config(path)
    try:
        with as_transformers_reads(path) as folder:
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # what the headers did not show: transformers and its libraries raise a dozen kinds
        raise LegolmError(f"model: {path} cannot be loaded ({brief(error)})") from None
    if not all(finite(parameter) for parameter in model.parameters()):
        check_weights(path)  # knows their names on disk
        raise LegolmError(f"model: {path}: its weights are not finite in float32; take another checkpoint")
    drop_sampling(model.generation_config)
    drop_code(model.config)
    model.requires_grad_(False)
    modules, layers = family_of(model.config).modules, decoder_layers(model)
    as_linears(layers)
    for layer in layers:
        for module in modules:
            layer.get_submodule(module).to(linears)
    model.config.use_cache = False
    by_own_length(model)
    return model.eval()


def load_tokenizer(path: Path, data: DataConfig | None = None) -> Any:
    """The checkpoint's tokenizer, without names of code; padding falls back to the end-of-text token.

    It has the chat template and the day of `data`, if given, else what was saved with it. Raises `LegolmError` for one
    that is broken, has no end-of-text token, or has tokens that the model has no row for.
    """
    where = f"model: {path}"
    for file in path.glob("*token*"):
        if file.is_file() and file.stat().st_size > MAX_TOKENIZER:
            raise LegolmError(f"model: {file}: has {file.stat().st_size} bytes; at most {MAX_TOKENIZER} are read")
        if file.is_file():
            with reading(f"model: {file}"):  # transformers would say that it is broken, or do without
                file.open("rb").close()
    config = load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
        ids = tokenizer.get_vocab()
        tokenizer.encode("a", add_special_tokens=False)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    except BaseException as error:  # its Rust library panics, which is no `Exception`
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise LegolmError(f"{where}: has no readable tokenizer ({brief(error)}); {SAVE_AGAIN}") from None
    if tokenizer.eos_token_id is None:
        raise LegolmError(
            f"{where}: its tokenizer has no eos_token to end answers with; name one in tokenizer_config.json"
        )
    rows = config.vocab_size
    # A few text-only models keep special tokens of their multimodal kin (Gemma 3), which no text makes.
    beyond = [token for token, index in ids.items() if index >= rows and index not in special]
    if beyond or tokenizer.eos_token_id >= rows:
        token = min(beyond or [tokenizer.eos_token], key=lambda token: ids[token])
        raise LegolmError(
            f"{where}: its tokenizer has {len(ids)} tokens and the model rows for {rows} (vocab_size), none for "
            f"{brief(repr(token))}, id {ids[token]}; copy the tokenizer that belongs to it there, or save the model "
            "after `resize_token_embeddings`"
        )
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.rows = rows  # of the model's embeddings, which `data.encode` holds every text to
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    if data is not None:
        set_template(tokenizer, data)
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
    for name, (file, _) in sorted(stored_weights(path).items()):
        with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
            tensor = handle.get_tensor(name)
        check_finite(name, tensor, file)
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, as stored, of all that a checkpoint holds, one at a time."""
    for name, (file, _) in stored_weights(path).items():
        with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
            yield name, handle.get_tensor(name)


def side_files(path: Path) -> list[Path]:
    """What lies beside a checkpoint's weights and belongs to it: config, tokenizer, coverage, licence."""
    named = (file for file in path.iterdir() if any(one.fullmatch(file.name) for one in (SIDE_FILES, CARRIED)))
    found = sorted(file for file in named if file.is_file())
    for file in found:
        check_own(file)
    return found


def copy_side_files(path: Path, out: Path) -> None:
    """Copy them into the folder `out`."""
    for file in side_files(path):
        shutil.copy2(file, out / file.name)


def copy_checkpoint(path: Path, out: Path) -> None:
    """Copy all that belongs to a checkpoint into the folder `out`, and nothing else that lies there."""
    copy_side_files(path, out)
    place_weights(path, out, shutil.copy2)


def count_parameters(path: Path) -> int:
    """Parameters stored in a checkpoint's weight files; tied ones are stored, and counted, once."""
    return sum(math.prod(stored.shape) for _, stored in stored_weights(path).values())


def check_weights(path: Path) -> None:
    """Read a checkpoint's weights. Raises `LegolmError` for one that is not finite, with its name and file."""
    check_files(weight_files(path))


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(Path(root, name).stat().st_size for root, _, names in os.walk(path) for name in names)
