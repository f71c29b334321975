"""Make a checkpoint to prune of a quantized one, one tensor at a time, and of the text part of a multimodal one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from legolm.errors import LegolmError, brief
from legolm.models import gguf
from legolm.models.beside import carry
from legolm.models.checkpoint import (
    FLOATS,
    SAVE_AGAIN,
    difference,
    drop_code,
    ggufs_in,
    is_gguf,
    load_config,
    model_of,
    read_config,
    shapes_of,
    stored_weights,
    weight_files,
)
from legolm.models.family import shape_of
from legolm.models.finite import finite
from legolm.models.layered import CheckpointWriter
from legolm.models.layout import check_dense
from legolm.models.load import check_weights, load_tokenizer, resolve
from legolm.models.quantized import HELP, Format, Settings, format_of, settings_of
from legolm.models.text_part import write_text_part
from legolm.system import Progress, Stored, atomic_folder, check_room, open_tensors


def import_model(model: str, out: Path, progress: Progress) -> None:
    """Dequantize `model`, a GGUF file, a folder or a hub id, into the folder `out`: whole, or not at all.

    Of a multimodal model its text part is taken, in the dtype that it is stored in. Raises `LegolmError` for a text
    model that is not quantized, a multimodal one that is or has no text model of its own inside, a format that cannot
    be undone, and for weights that are not those of its config.
    """
    path = _find(model)
    with atomic_folder(out) as folder, progress.stage(f"import {path.name}", 100) as advance:
        told = 0

        def tell(share: float) -> None:
            nonlocal told
            advance(int(100 * share) - told)
            told = int(100 * share)

        if is_gguf(path):
            gguf.convert(path, folder, None, tell, room=lambda needed: check_room(out, needed))
        elif getattr(config := read_config(path), "text_config", None) is not None:
            _take_text(path, folder, out, config)
        else:
            _dequantize(path, folder, out, config, tell)
        try:
            load_config(folder)
            check_weights(folder)
            load_tokenizer(folder)
        except LegolmError as error:
            raise LegolmError(str(error).replace(str(folder), str(path))) from None


def _find(model: str) -> Path:
    """The GGUF file or the folder."""
    path = Path(model)
    if is_gguf(path) and path.exists():
        return path
    if path.is_dir() and not (path / "config.json").is_file() and (files := ggufs_in(path)):
        if len(files) > 1:
            raise LegolmError(f"model: {model} holds {', '.join(file.name for file in files)}; give one of them")
        return files[0]
    return resolve(model)


def _take_text(path: Path, folder: Path, out: Path, config: Any) -> None:
    if settings_of(path, config) is not None:
        raise LegolmError(f"model: {path} is quantized, and more than a text model; {HELP}")
    tokenizer = _tokenizer(path)
    check_room(out, sum(file.stat().st_size for file in weight_files(path)))
    write_text_part(path, folder)
    _write_beside(path, folder, tokenizer)


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as `load_tokenizer`
        raise LegolmError(f"model: {path}: has no readable tokenizer ({brief(error)}); {SAVE_AGAIN}") from None


def _write_beside(path: Path, folder: Path, tokenizer: Any) -> None:
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.save_pretrained(folder)
    carry(path, folder)


def _dequantize(path: Path, folder: Path, out: Path, config: Any, advance: Callable[[float], Any]) -> None:
    settings = settings_of(path, config)
    if settings is None:
        raise LegolmError(f"model: {path} is not quantized; give it as it is")
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    drop_code(config)
    shape_of(config)
    try:
        how = format_of(settings)
    except LegolmError as error:
        raise LegolmError(str(error).replace("model: ", f"model: {path}: ", 1)) from None
    tokenizer = _tokenizer(path)
    dtype = config.dtype if config.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16
    stored = stored_weights(path)
    layers, model = layers_of(stored, how), model_of(path, config)
    check_dense(model)
    names = {layer: layer if "" in parts else f"{layer}.weight" for layer, parts in layers.items()}
    wanted = shapes_of(model, names.values())
    # AutoGPTQ writes zeros for biases that are none.
    extra = {layer for layer in layers if layer.endswith(".bias") and layer not in wanted}
    shapes = {
        name: stored[layer][1].shape if layer == name else wanted.get(name, ())
        for layer, name in names.items()
        if layer not in extra
    }
    if differ := difference(model, {name: Stored("F32", shape) for name, shape in shapes.items()}):
        raise LegolmError(f"model: {path}: config.json and the weights differ: {differ}; take another checkpoint")
    check_room(out, sum(map(math.prod, shapes.values())) * dtype.itemsize)
    writer = CheckpointWriter(folder, dtype)
    for number, (layer, parts) in enumerate(sorted(layers.items()), 1):
        tensors = {end: _read(stored[name][0], name) for end, name in parts.items()}
        if "" in parts and stored[layer][1].dtype not in FLOATS:
            raise LegolmError(f"model: {path}: {layer} is {stored[layer][1].dtype} and has no scale; {HELP}")
        name = names[layer]
        if layer in extra and not bool(tensors[""].any()):
            continue
        weight = tensors[""] if layer == name else _weight(path, layer, tensors, how, settings)
        if name in wanted and weight.shape != wanted[name]:
            raise LegolmError(
                f"model: {path}: {name} is {list(weight.shape)} and should be {list(wanted[name])}; take another "
                "checkpoint"
            )
        if not finite(weight.to(dtype)):
            raise LegolmError(f"model: {path}: {name} is not finite in {dtype}; take another checkpoint")
        writer.add("", {name: weight})
        advance(number / len(layers))
    writer.close()
    config.dtype = dtype
    config.save_pretrained(folder)
    _write_beside(path, folder, tokenizer)


def layers_of(names: Mapping[str, Any], how: Format) -> dict[str, dict[str, str]]:
    """Names of tensors by quantized layer and end of the name; one that is whole by itself, by its name and ""."""
    marks = "|".join(map(re.escape, how.marks))
    quantized = {found[1] for name in names if (found := re.fullmatch(rf"(.*)\.(?:{marks})", name))}
    found_all: dict[str, dict[str, str]] = {layer: {} for layer in quantized}
    ends = sorted([*how.parts, *how.unused], key=len, reverse=True)
    split = re.compile(rf"(.*?)\.({'|'.join(map(re.escape, ends))})")
    for name in names:
        found = split.fullmatch(name)
        if found and found[2] in how.unused:
            continue
        if found and found[1] in quantized:
            found_all[found[1]][found[2]] = name
        else:
            found_all[name] = {"": name}
    return found_all


def _weight(path: Path, layer: str, parts: Mapping[str, Tensor], how: Format, settings: Settings) -> Tensor:
    try:
        return how.weight(parts, settings)
    except (LegolmError, KeyError, RuntimeError, IndexError, ValueError, StopIteration, ArithmeticError) as error:
        why = f"it has no {brief(error)}" if isinstance(error, KeyError) else brief(error)
        raise LegolmError(f"model: {path}: {layer} cannot be dequantized ({why}); take another checkpoint") from None


def _read(file: Path, name: str) -> Tensor:
    with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor
