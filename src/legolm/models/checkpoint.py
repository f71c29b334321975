"""A checkpoint's folder before any weight is read: its config and its weights' headers, checked against each other."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from legolm.errors import LegolmError, brief
from legolm.models.family import check_kind, known_family, quantized_error
from legolm.models.layout import check_dense, empty_model, layout_of
from legolm.system import Stored, file_state, open_tensors, read_bounded, reading, stored_tensors, strict_json

SINGLE, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
SAVE_AGAIN = "save it again with save_pretrained"
MAX_CONFIG = 4 << 20
"""Bytes of a config."""
QUANTIZED = ("quantize_config.json", "hf_quant_config.json")
"""Where older tools say of a checkpoint what others write into its config."""
MAX_INDEX = 64 << 20
LARGEST = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 31,
    # GPT-2's and OPT's own names of these.
    "n_layer": 1 << 10,
    "n_embd": 1 << 17,
    "n_inner": 1 << 20,
    "ffn_dim": 1 << 20,
    "word_embed_proj_dim": 1 << 17,
    "n_head": 1 << 12,
    "n_positions": 1 << 31,
}
"""Sizes in a config: some times those of the largest models there are. transformers makes lists as long as them."""
ABOVE_0 = r"(^|_)(eps|epsilon|theta|base|freq|factor|multiplier|scaling|scalar|softcapping)$"
"""Numbers in a config that divide, or that all is multiplied with."""
ADAPTER = "adapter_config.json"
"""Beside a model's weights it has transformers load the model that it names, with its adapter."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNUSED = r"rotary_emb\.inv_freq$"
"""Tensors of older checkpoints that transformers passes over in every family."""


def load_config(path: Path) -> Any:
    """The checkpoint's config, its `dtype` that of the stored weights, without names of code.

    Raises `LegolmError` for one that is broken or absurd, for a family that is not known, and when the weights' headers
    are not what the config says. No weights are read and no code of the checkpoint is run.
    """
    read = [path / name for name in ("config.json", GENERATION, ADAPTER, *QUANTIZED, INDEX)]
    read += sorted(path.glob("*.safetensors"))
    with reading(f"model: {path}"):
        states = tuple(f"{file.name} {file_state(file) if file.exists() else ''}" for file in read)
        return copy.deepcopy(_checked(path, states))


@lru_cache(maxsize=64)
def _checked(path: Path, _states: tuple[str, ...]) -> Any:
    """What `load_config` gives, which a run asks for many times."""
    config = read_config(path)
    check_kind(config)
    if any((path / name).exists() for name in QUANTIZED):
        raise quantized_error("")
    if (path / ADAPTER).exists():
        raise LegolmError(
            f"model: {path}: has {ADAPTER} beside the model, and nothing says whether its weights have that adapter; "
            "move the adapter into a folder of its own, or merge it and save the model alone"
        )
    if (path / GENERATION).exists():
        _check_generation(path / GENERATION)
    model = model_of(path, config)
    check_dense(model)
    drop_code(config)
    config.dtype = _check_weights(path, model)
    layout_of(config)
    return config


def read_config(path: Path) -> Any:
    """The config alone, quantized or not. Raises `LegolmError` for one that is broken or absurd."""
    where = f"model: {path / 'config.json'}"
    check_sizes(read_object(path / "config.json", MAX_CONFIG), where)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a dozen config classes make of values that they did not expect
        raise LegolmError(f"{where}: is no config that transformers reads ({brief(error)})") from None


def is_gguf(path: Path) -> bool:
    """Whether a file is named like one; folders are none."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def ggufs_in(folder: Path) -> list[Path]:
    """The GGUF files in a folder."""
    return sorted(filter(is_gguf, folder.glob("*")))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files with the model's weights: those that the index names, else `model*.safetensors`.

    Others beside them are none of the model's. Raises `LegolmError` for one that is missing.
    """
    if (path / INDEX).is_file():
        return sorted(path / file for file in set(_shards(path).values()))
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    found = sorted(file for file in path.glob("model*.safetensors") if file.is_file())
    if not found:
        gguf, way_out = next(iter(ggufs_in(path)), None), SAVE_AGAIN
        if gguf is not None:
            way_out = f"run: legolm import {quote(str(gguf))} --out DIR, and give DIR"
        elif (path / "sparse.safetensors").is_file():
            way_out = "legolm.load reads its bit masks and values; save that with save_pretrained"
        raise LegolmError(f"model: {path} holds no safetensors weights; {way_out}")
    return found


@contextmanager
def as_transformers_reads(path: Path) -> Iterator[Path]:
    """The folder, or where transformers would take other weights in it, one with links to what is the model's."""
    files = weight_files(path)
    if files == [path / SINGLE] or not ((path / SINGLE).exists() or not (path / INDEX).exists()):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="legolm-") as scratch:
        place_weights(path, Path(scratch), lambda file, place: place.symlink_to(file.resolve()))
        for file in (path / name for name in ("config.json", GENERATION) if (path / name).exists()):
            (Path(scratch) / file.name).symlink_to(file.resolve())
        yield Path(scratch)


def place_weights(path: Path, folder: Path, place: Callable[[Path, Path], object]) -> None:
    """Copy or link a checkpoint's weights, as `place` does, into a folder where transformers finds them: all but a
    single file of the usual name by an index, written from the weights.
    """
    files = weight_files(path)
    for file in files:
        place(file, folder / file.name)
    if files != [path / SINGLE]:
        index = {name: file.name for name, (file, _) in stored_weights(path).items()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n")


def stored_weights(path: Path) -> dict[str, tuple[Path, Stored]]:
    """File and form of each of a checkpoint's tensors, by name. Raises `LegolmError` for weights that are broken."""
    found: dict[str, tuple[Path, Stored]] = {}
    for file in weight_files(path):
        for name, tensor in stored_tensors(file, "model: ", SAVE_AGAIN).items():
            if name in found:
                raise LegolmError(f"model: {file}: has {brief(name)}, and so has {found[name][0].name}; {SAVE_AGAIN}")
            found[name] = file, tensor
    if (path / INDEX).is_file():
        for name, shard in _shards(path).items():
            if name not in found or found[name][0].name != shard:
                raise LegolmError(
                    f"model: {path / shard}: lacks {brief(name)}, which {INDEX} says it has; {SAVE_AGAIN}"
                )
    return found


def _shards(path: Path) -> dict[str, str]:
    """Tensor -> name of the file beside the index that has it."""
    where = f"model: {path / INDEX}"
    shards = read_object(path / INDEX, MAX_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise LegolmError(f"{where}: has no `weight_map` of tensors' names and files; {SAVE_AGAIN}")
    for shard in {json.dumps(shard): shard for shard in shards.values()}.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise LegolmError(
                f"{where}: names {brief(json.dumps(shard))}; it may name safetensors files beside it only"
            )
        if not (path / shard).is_file():
            raise LegolmError(f"{where}: names {shard}, and there is no such file; copy it there, or {SAVE_AGAIN}")
    return shards


def read_object(path: Path, most: int) -> dict[str, Any]:
    """A JSON object from one of a checkpoint's files. Raises `LegolmError` when it is broken."""
    try:
        with reading(f"model: {path}"):
            if not path.is_file():
                raise LegolmError(f"model: no file {path}; give the folder of a Hugging Face checkpoint")
            content = read_bounded(path, most)
        value = strict_json(content.decode())
    except ValueError as error:
        raise LegolmError(f"model: {path}: is not valid JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise LegolmError(f"model: {path}: must be a JSON object, not {type(value).__name__}")
    return value


def check_sizes(raw: Mapping[str, Any], where: str) -> None:
    """Of a config as it is written, before transformers makes anything of them."""
    if "configuration_files" in raw:  # transformers would read another file in the place of this one
        raise LegolmError(f"{where}: names other configs (`configuration_files`); put the one that counts in its place")
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise LegolmError(f"{where}: has no `model_type`; {SAVE_AGAIN}")
    if "text_config" not in raw:  # of those that have one more is said later
        known_family(family)
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise LegolmError(f"{where}: `architectures` = {brief(repr(named))}: must be a list of names")
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, dict) else {}):
        for name, most in LARGEST.items():
            size = part.get(name)
            if size is not None and (type(size) is not int or not 1 <= size <= most):
                raise LegolmError(
                    f"{where}: `{name}` = {brief(json.dumps(size))[:40]}: must be a whole number from 1 to {most}"
                )
    _check_numbers(raw, "", where)


def _check_numbers(value: Any, name: str, where: str) -> None:
    """Also in the objects and lists of a config, whose numbers have its names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, f"{name}.{key}" if name else key, where)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, name, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        above = bool(re.search(ABOVE_0, name.rpartition(".")[2]))
        # Not math.isfinite: a whole number may be beyond every float.
        if not abs(value) <= sys.float_info.max or (above and value <= 0):
            must = "a number above 0" if above else "a finite number"
            raise LegolmError(f"{where}: `{name}` = {brief(json.dumps(value))[:40]}: must be {must}; {SAVE_AGAIN}")


def _check_generation(path: Path) -> None:
    from transformers import GenerationConfig

    raw = read_object(path, MAX_CONFIG)
    try:
        found = GenerationConfig.from_dict(raw)
        drop_sampling(found)
        found.validate(strict=True)  # as it will be before the trained model is written
    except Exception as error:  # as with configs
        raise LegolmError(f"model: {path}: is no generation config ({brief(error)}); mend it, or remove it") from None


def drop_code(config: Any) -> None:
    """Take the names of classes out of a config whose code is neither run nor written."""
    if hasattr(config, "auto_map"):
        del config.auto_map


def drop_sampling(generation: Any) -> None:
    """Take the flags of sampling out of a config that does not sample: they do nothing, and cannot be saved."""
    if not generation.do_sample:
        for flag in SAMPLING:
            setattr(generation, flag, None)


def _check_weights(path: Path, model: Any) -> torch.dtype:
    """The dtype that most of the weights are stored in.

    Raises `LegolmError` unless the tensors are those of the config's model, which is made without memory. Only where a
    tied head is stored are two of them read.
    """
    weights = stored_weights(path)
    named = full_names(model, weights)
    if differ := difference(model, {name: stored for name, (_, stored) in weights.items()}):
        raise LegolmError(f"model: {path}: config.json and the weights differ: {differ}; {SAVE_AGAIN}")
    places = {_today(named[name]): (file, name) for name, (file, _) in weights.items()}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in places and source in places and not torch.equal(*(_read(*places[one]) for one in (name, source))):
            raise LegolmError(
                f"model: {path}: config.json has {name} be {source} (tie_word_embeddings), and they are stored with "
                "different values; set it to false where both are meant, else leave the head out"
            )
    known = {_today(name) for name in model.state_dict()}
    return main_dtype(weights[name][1] for name in sorted(weights) if _today(named[name]) in known)


def difference(model: Any, stored: Mapping[str, Stored]) -> str | None:
    """What is other in tensors than in the model that they are said to be of; None where they fit."""
    wanted = {_today(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    named = full_names(model, stored)
    found = {_today(named[name]): one for name, one in stored.items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    unused = [UNUSED, *(model._keys_to_ignore_on_load_unexpected or ())]
    foreign = [name for name in found.keys() - wanted.keys() if not any(re.search(one, name) for one in unused)]
    both = sorted(found.keys() & wanted.keys())
    shaped = {name: f"{name} is {list(found[name].shape)} and should be {list(wanted[name])}" for name in both}
    for fault, names in (
        ("missing", sorted(wanted.keys() - found.keys() - tied)),
        ("foreign", sorted(foreign)),
        ("of another shape", [said for name, said in shaped.items() if found[name].shape != wanted[name]]),
        (f"not {', '.join(FLOATS)}", [f"{n} is {found[n].dtype}" for n in both if found[n].dtype not in FLOATS]),
    ):
        if names:
            several = f", the first of {len(names)} tensors" if len(names) > 1 else ""
            return f"{brief(names[0])}{several}, {fault}"
    return None


def _read(file: Path, name: str) -> Tensor:
    with open_tensors(file, "model: ", SAVE_AGAIN) as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor


def main_dtype(stored: Iterable[Stored]) -> torch.dtype:
    """The dtype that most of the weights are stored in, all of them one of `FLOATS`."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return FLOATS[sizes.most_common(1)[0][0]]


def model_of(path: Path, config: Any) -> Any:
    """The config's model, without memory. Raises `LegolmError` for a config that makes none."""
    try:
        return empty_model(config)
    except LegolmError as error:
        raise LegolmError(f"{error}: {path / 'config.json'}") from None


def shapes_of(model: Any, stored: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The model's shape of each stored tensor that is one of its."""
    shapes = {_today(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shapes[_today(own)] for name, own in full_names(model, stored).items() if _today(own) in shapes}


def full_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each stored tensor: GPT-2's checkpoints are of the decoder alone, and leave its name out."""
    names, prefix = list(stored), f"{model.base_model_prefix}."
    own = set(names) if any(name.startswith(prefix) for name in names) else set(model.state_dict())
    return {name: name if name in own else prefix + name for name in names}


def _today(name: str) -> str:
    """GPT-NeoX's head has another name in checkpoints than in transformers' model of today."""
    return re.sub(r"^embed_out\.", "lm_head.", name)
