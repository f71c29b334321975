"""GGUF files, dequantized one tensor at a time: transformers knows the names, the `gguf` package the formats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from legolm.errors import LegolmError, brief
from legolm.models.checkpoint import check_sizes, difference
from legolm.models.family import check_kind
from legolm.models.gguf_settings import settle
from legolm.models.layered import CheckpointWriter
from legolm.models.layout import check_dense, empty_model
from legolm.models.splits import BEGINNING, split_as
from legolm.system import Stored

ROPE = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How Llama 3's models of all sizes scale their rotary frequencies; the factor differs."""


def convert(
    gguf: Path,
    folder: Path,
    dtype: torch.dtype | None,
    advance: Callable[[float], Any],
    shard_bytes: int | None = None,
    room: Callable[[int], Any] = lambda needed: None,
) -> None:
    """Write the model in a GGUF file as a checkpoint in `dtype`: if None, its own if it is one's, else bfloat16.

    `room` is told the bytes of the weights before any is written, `advance` the share that is done. Raises
    `LegolmError` for a file that transformers cannot read, for sizes that are absurd or not those of the tensors, and
    for tensors and settings that transformers would pass over.
    """
    opened = _open(gguf)
    kinds = [stored.tensor_type.name for stored in opened.tensors if len(stored.shape) > 1]
    own = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
    dtype = dtype or (own.get(kinds[0]) if len(set(kinds)) == 1 else None) or torch.bfloat16
    room(_check_tensors(opened) * dtype.itemsize)
    config, writer = opened.config, CheckpointWriter(folder, dtype, shard_bytes)
    for number, stored in enumerate(opened.tensors, 1):
        weights = opened.read(stored)
        if stored.name == ROPE:
            config.rope_parameters = _rope(gguf, config, weights)
        else:
            writer.add("", {opened.places[stored.name]: weights})
        advance(number / len(opened.tensors))
    writer.close()
    config.dtype = dtype
    config.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    opened.model.generation_config.save_pretrained(folder)


@dataclass(frozen=True)
class _Opened:
    """A GGUF file whose tensors are still to be read: its config and the model of that, without memory.

    `places` are the model's names of the file's tensors.
    """

    file: Path
    tensors: list[Any]
    config: Any
    tokenizer: Any
    model: Any
    processor: Any
    places: Mapping[str, str]

    def read(self, stored: Any) -> Tensor:
        """A tensor's weights. Raises `LegolmError` where they cannot be read."""
        from gguf import dequantize

        with self._reading(stored):
            return torch.tensor(self._placed(dequantize(stored.data, stored.tensor_type), stored.name))

    def shape(self, stored: Any) -> tuple[int, ...]:
        """What `read` will give, from the header alone."""
        with self._reading(stored):
            empty = np.broadcast_to(np.int8(0), [int(size) for size in reversed(stored.shape)])
            return tuple(self._placed(empty, stored.name).shape)

    def _placed(self, weights: Any, name: str) -> Any:
        """As transformers' model has them: of heads llama.cpp's Llama has another order."""
        told = {"tensor_key_mapping": self.places, "parsed_parameters": {}}
        return self.processor.process(weights=weights, name=name, **told).weights

    @contextmanager
    def _reading(self, stored: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in `_open`
            raise LegolmError(f"model: {self.file}: {brief(stored.name)} cannot be read ({brief(error)})") from None


def _open(gguf: Path) -> _Opened:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise LegolmError("model: reading GGUF needs gguf; run: pip install 'legolm[starter]'") from None
    from transformers import AutoConfig, AutoTokenizer
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf.name.lower()):
        raise LegolmError(f"model: {gguf}: is one of several parts; join them with llama-gguf-split --merge")
    where = f"model: {gguf}"
    try:
        reader = GGUFReader(gguf)
        with _once(reader):
            raw = load_gguf_checkpoint(gguf)["config"]
            check_sizes(raw, where)
            config = AutoConfig.for_model(**raw)
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
            check_kind(config)
            names = [stored.name for stored in reader.tensors]
            architecture = _told(reader, "general.architecture")
            settings = {
                key.removeprefix(f"{architecture}."): field.contents()
                for key, field in reader.fields.items()
                if key.startswith(f"{architecture}.")
            }
            read = GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING[architecture]
            left = settle(settings, read, names, config)
            check_sizes(config.to_dict(), where)
            model = empty_model(config)
            check_dense(model)
            processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
            places = get_gguf_hf_weights_map(model, processor)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except LegolmError as error:
        raise LegolmError(str(error) if where in str(error) else str(error).replace("model", where, 1)) from None
    except Exception as error:  # transformers and gguf raise a dozen kinds
        raise LegolmError(
            f"{where}: transformers cannot read it ({brief(error)}); take the model's safetensors from the hub"
        ) from None
    if left:
        _refuse(gguf, f"{architecture}.{brief(left[0])} ({brief(str(settings[left[0]]))})")
    pre = _told(reader, "tokenizer.ggml.pre")
    if _told(reader, "tokenizer.ggml.model") == "gpt2" and not split_as(tokenizer.backend_tokenizer, pre):
        _refuse(gguf, f"its pre-tokenizer ({brief(pre)})")
    if "tokenizer.ggml.add_bos_token" not in reader.fields and pre in BEGINNING:
        tokenizer.add_bos_token = True
    return _Opened(gguf, reader.tensors, config, tokenizer, model, processor, places)


def _told(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents()) if key in reader.fields else "none"


def _check_tensors(opened: _Opened) -> int:
    """Numbers in all tensors. Raises `LegolmError` unless they are those of the model."""
    found = {}
    for stored in opened.tensors:
        if stored.name == ROPE:
            continue
        if stored.name not in opened.places:
            _refuse(opened.file, brief(stored.name))
        found[opened.places[stored.name]] = Stored("F32", opened.shape(stored))
    if differ := difference(opened.model, found):
        raise LegolmError(
            f"model: {opened.file}: its settings and its tensors differ: {differ}; take the model's safetensors from "
            "the hub"
        )
    return sum(math.prod(stored.shape) for stored in found.values())


@contextmanager
def _once(reader: Any) -> Iterator[None]:
    """Let transformers have the file as it is parsed: it would parse every token again for the config, and again; and
    let it make the table of names once, not for each part of the model."""
    import gguf

    real = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda *_: reader, cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = real


def _rope(gguf: Path, config: Any, factors: Tensor) -> Mapping[str, Any]:
    """The config's rotary settings with what (head size / 2,) factors say of them. Raises `LegolmError` for others."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if bool((factors == 1).all()):
        return parameters
    if parameters.get("rope_type") != "default":  # scaled already, or with bases of their own for sliding layers
        _refuse(gguf, ROPE)
    if bool((factors == factors.max()).all()):
        return parameters | {"rope_type": "linear", "factor": float(factors.max())}
    plain = parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    wanted = parameters | LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
    config.rope_parameters = wanted
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != factors.shape or not torch.allclose(scaled, plain / factors, rtol=1e-4):
        _refuse(gguf, ROPE)
    return wanted


def _refuse(gguf: Path, what: str) -> None:
    raise LegolmError(
        f"model: {gguf}: transformers has no place for {what}, and without it this would be another model; take the "
        "model's safetensors from the hub"
    )
