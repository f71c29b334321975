"""What a decoder's code says of its layers: read from the model without weights, and proved on a small copy of it.

A family needs no entry for that, and none is believed: what transformers' code does to a config is seen, not guessed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from legolm.errors import LegolmError, brief
from legolm.models.cut import config_changes, sizes_in
from legolm.models.family import FAMILIES, LLAMA, ONLY_DENSE, Shape, decoder_layers, family_of, shape_of
from legolm.system import atomic_write, cache_folder, versions

WINDOW, NEURONS, VOCABULARY = 4, 48, 64
"""Of the copy: attention reaches past its window, and matrices are small."""
NO_DENSE = (
    (r"(^|[._])experts?([._]|$)|(^|[._])moe([._]|$)", "a mixture of experts"),
    (r"mamba|A_log|rg_lru|linear_attn|receptance|lstm|conv1d|\.conv\.|\.mixer\.", "a state-space or recurrent model"),
)
"""What a tensor's name says of a model that is no dense decoder."""
REASONS = {
    "a mixture of experts": "coverage says which layers, KV groups and neurons a block keeps, not which experts",
    "a state-space or recurrent model": "its layers carry a state, which has no KV groups to cut",
    "a hybrid of attention and state-space layers": "its layers differ in their linear layers",
}
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "use_cache")
"""Of a config, what does not say what its model is."""
INDEX = re.compile(r"layer_?(idx|id|index|number)$")
"""A layer's own place, as modules call it."""


class Layout(BaseModel):
    """What a config does not say of its decoder layers.

    `norms`: the module between a linear layer's output and the sum with the residual stream, where there is one.
    `added`: the part of the MLP's answer that the sum gets (Granite's `residual_multiplier`). `fixed` says of a field
    of `Shape` that structured pruning must leave it alone, and why. `query_norms`: queries and keys are normalised.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    norms: dict[str, str] = {}
    added: float = 1.0
    fixed: dict[str, str] = {}
    query_norms: bool = False


_KNOWN: dict[str, Layout] = {}


def layout_of(config: Any) -> Layout:
    """The layout of a Hugging Face model config, read and proved once: the proof is kept in the user's cache.

    Raises `LegolmError` for a decoder that is not dense or whose layers are not as its family says, and when the proof
    fails, naming the check.
    """
    key = _hash(config)
    if key not in _KNOWN:
        kinds = _facts(config, range(config.num_hidden_layers))
        places = _by_place(config, kinds)
        # The first layer, and the first that differs from it; without one the last.
        small = copy_config(config, (0, next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(kinds) - 1)))
        file = cache_folder() / "layouts" / f"{_hash(small, places)}.json"
        _KNOWN[key] = _cached(file) or _keep(file, _prove(small, places))
    return _KNOWN[key]


def _prove(small: Any, places: dict[str, str]) -> Layout:
    from legolm.models.proof import prove  # which reads what is here

    query_norms = any("q_norm" in name for name in _tensors(small))
    return prove(small, places | _fixed(small)).model_copy(update={"query_norms": query_norms})


def empty_model(config: Any) -> Any:
    """transformers' model of a config, without memory for weights. Raises `LegolmError` when it cannot be made."""
    # Here, not above: it brings all that transformers has for models.
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # whatever a hundred config and model classes make of values they did not expect
        raise LegolmError(
            f"model: family {config.model_type!r}: transformers cannot make it ({brief(error)})"
        ) from None


def check_dense(model: Any) -> None:
    """Raise `LegolmError` for a model that is no dense decoder of linear layers that its family has, saying why."""
    family, names = model.config.model_type, list(model.state_dict())
    kind = next((kind for words, kind in NO_DENSE if any(re.search(words, name) for name in names)), None)
    if kind == "a state-space or recurrent model" and any(re.search(r"q_proj|qkv_proj|to_q", name) for name in names):
        kind = "a hybrid of attention and state-space layers"
    if kind is not None:
        raise LegolmError(f"model: {family!r} is {kind}: {REASONS[kind]}; {ONLY_DENSE}")
    entry = family_of(model.config)
    try:
        layers = list(decoder_layers(model))
    except (AttributeError, AssertionError):
        raise LegolmError(f"model: family {family!r} has no decoder layers at {entry.layers}; {ONLY_DENSE}") from None
    for layer in layers:
        found = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        if found != set(entry.modules):
            other = ", ".join(sorted(found - set(entry.modules)) or sorted(set(entry.modules) - found))
            told = "has" if found - set(entry.modules) else "lacks"
            like = "" if family in FAMILIES else "; it has no entry, and Llama's layers are " + ", ".join(LLAMA.modules)
            raise LegolmError(f"model: family {family!r} {told} {brief(other)} in its layers{like}; {ONLY_DENSE}")


def copy_config(config: Any, kept: tuple[int, int]) -> Any:
    """The same model small: two of its layers, two KV groups of at most two heads as wide as its own."""
    shape = shape_of(config)
    groups, heads = min(shape.kv_groups, 2), min(shape.queries_per_group, 2)
    small = replace(shape, layers=2, kv_groups=groups, queries_per_group=heads, neurons=NEURONS)
    hidden = groups * heads * shape.head_dim
    # Where the heads need not fill the hidden size they do not.
    hidden += 0 if shape.hidden == shape.kv_groups * shape.queries_per_group * shape.head_dim else shape.head_dim
    copied = copy.deepcopy(config)
    sizes = sizes_in(config, small, kept) | {"hidden_size": hidden, "vocab_size": VOCABULARY}
    if getattr(config, "word_embed_proj_dim", None):  # OPT's embeddings
        sizes["word_embed_proj_dim"] = hidden if config.word_embed_proj_dim == shape.hidden else hidden // 2
    if getattr(config, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    sizes |= {name: 0 for name in config.to_dict() if name.endswith("_token_id") and getattr(config, name) is not None}
    copied.update(sizes)
    copied.dtype = "float32"
    return copied


def _fixed(small: Any) -> dict[str, str]:
    """Sizes of `Shape` that a config of this family cannot change without changing more than its matrices."""
    shape, fixed = shape_of(small), {}
    whole = _tensors(small)
    for name, module in _expected(shape, shape, whole).items():
        if whole[name] != module:
            raise LegolmError(
                f"model: family {small.model_type!r} has {name} of {list(whole[name])}, and Llama's would be "
                f"{list(module)}; {ONLY_DENSE}"
            )
    for size, count in (("kv_groups", shape.kv_groups - 1), ("neurons", NEURONS - 8)):
        if not count:
            continue
        narrow = replace(shape, **{size: count})  # type: ignore[arg-type]
        changed = copy.deepcopy(small)
        try:
            changed.update(config_changes(small, narrow, (0, 1)))
            found = _tensors(changed)
        except Exception as error:  # as above
            fixed[size] = f"with fewer there is no model ({brief(error)})"
            continue
        wanted = _expected(shape, narrow, whole)
        differ = [name for name in whole if found.get(name) != wanted[name]]
        if differ and size == "kv_groups":
            norms = all("norm" in name for name in differ)
            fixed[size] = (
                "its queries and keys are normalised over all heads together"
                if norms
                else "its heads must fill the hidden size"
            )
        elif differ:
            fixed[size] = f"its config cannot say so ({differ[0]})"
    return fixed


def _tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the first layer's tensors; of a linear layer's weight (rows, columns)."""
    layer = decoder_layers(empty_model(config))[0]
    turned = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, Conv1D)}
    return {n: tuple(t.shape)[::-1] if n in turned else tuple(t.shape) for n, t in layer.state_dict().items()}


def _expected(shape: Shape, small: Shape, whole: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer that is cut to this shape."""
    wanted = dict(whole)
    for module in shape.modules:
        wanted[f"{module}.weight"] = small.matrix(module)
        if f"{module}.bias" in whole:
            wanted[f"{module}.bias"] = small.matrix(module)[:1]
    return wanted


def _by_place(config: Any, kinds: list[dict[str, Any]]) -> dict[str, str]:
    """`layers` as fixed where a layer's place, and no list in the config, says what it does."""
    rest = _facts(config, range(1, len(kinds))) if len(kinds) > 1 else []
    for before, after in zip(kinds[1:], rest, strict=True):
        if differ := sorted(name for name in before | after if before.get(name) != after.get(name)):
            return {"layers": f"{differ[0]} of a layer goes by its place, and config.json has no list of it"}
    return {}


def _facts(config: Any, kept: range) -> list[dict[str, Any]]:
    """What the modules of each layer have as plain values, of a model that keeps these layers."""
    shape, fewer = shape_of(config), copy.deepcopy(config)
    fewer.update(sizes_in(config, replace(shape, layers=len(kept)), kept))
    return [
        {f"{path}.{name}".strip("."): value for path, module in layer.named_modules() for name, value in _plain(module)}
        for layer in decoder_layers(empty_model(fewer))
    ]


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None) and not INDEX.search(name):
            yield name, value


def _hash(config: Any, *beside: Any) -> str:
    """Of all that a config says, and of what reads it."""
    said = {k: v for k, v in config.to_dict().items() if k not in VOLATILE}
    text = json.dumps([said, versions(), *beside], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _cached(file: Path) -> Layout | None:
    """What an earlier proof found; None when there is none that can be read."""
    try:
        return Layout.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _keep(file: Path, found: Layout) -> Layout:
    with contextlib.suppress(OSError, LegolmError):  # no room, or a home that cannot be written to
        atomic_write(file, found.model_dump_json())
    return found
