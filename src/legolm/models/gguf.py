"""GGUF files, dequantized one tensor at a time: transformers knows the names, the `gguf` package the formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legolm.errors import LegolmError, brief
from legolm.models.layered import CheckpointWriter
from legolm.models.splits import BEGINNING, split_as

ROPE = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How Llama 3's models of all sizes scale their rotary frequencies; the factor differs."""


def convert(
    gguf: Path,
    folder: Path,
    dtype: torch.dtype | None,
    advance: Callable[[float], Any],
    shard_bytes: int | None = None,
) -> None:
    """Write the model in a GGUF file as a checkpoint in `dtype`: if None, its own if it is one's, else bfloat16.

    `advance` is told the share that is done. Raises `LegolmError` for a file that transformers cannot read, and for
    tensors and settings that it would pass over.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise LegolmError("model: reading GGUF needs gguf; run: pip install 'legolm[starter]'") from None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf.name):
        raise LegolmError(f"model: {gguf}: is one of several parts; join them with llama-gguf-split --merge")
    where: dict[str, Any] = {"gguf_file": gguf.name}

    def told(key: str) -> str:
        return str(next(iter(read_field(reader, key)), "none"))

    try:
        reader = GGUFReader(gguf)
        with _once(reader):
            config = AutoConfig.from_pretrained(gguf.parent, **where)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            architecture = read_field(reader, "general.architecture")[0]
            scaling = set(read_field(reader, f"{architecture}.rope.scaling.type"))
            processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
            places = get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # transformers and gguf raise a dozen kinds
        raise LegolmError(
            f"model: {gguf}: transformers cannot read it ({brief(error)}); take the model's safetensors from the hub"
        ) from None
    if told("tokenizer.ggml.model") == "gpt2" and not split_as(tokenizer.backend_tokenizer, told("tokenizer.ggml.pre")):
        _refuse(gguf, f"its pre-tokenizer ({brief(told('tokenizer.ggml.pre'))})")
    if "tokenizer.ggml.add_bos_token" not in reader.fields and told("tokenizer.ggml.pre") in BEGINNING:
        tokenizer.add_bos_token = True
    if scaling - {"none"} and "factor" not in str(config.rope_parameters):
        _refuse(gguf, f"its rotary scaling ({brief(str(*scaling))})")

    kinds = [stored.tensor_type.name for stored in reader.tensors if len(stored.shape) > 1]
    own = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
    dtype = dtype or (own.get(kinds[0]) if len(set(kinds)) == 1 else None) or torch.bfloat16
    writer = CheckpointWriter(folder, dtype, shard_bytes)
    for number, stored in enumerate(reader.tensors, 1):
        try:
            weights = dequantize(stored.data, stored.tensor_type)
            done = processor.process(weights=weights, name=stored.name, tensor_key_mapping=places, parsed_parameters={})
        except Exception as error:  # as above
            raise LegolmError(f"model: {gguf}: {brief(stored.name)} cannot be read ({brief(error)})") from None
        if done.name in places:
            writer.add("", {places[done.name]: torch.tensor(done.weights)})
        elif stored.name == ROPE:
            config.rope_parameters = _rope(gguf, config, torch.tensor(weights))
        else:
            _refuse(gguf, brief(stored.name))
        advance(number / len(reader.tensors))
    writer.close()
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


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

    parameters = dict(config.rope_parameters)
    if bool((factors == 1).all()):
        return parameters
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
