"""Write GGUF files, one decoder layer in memory at a time: models, and LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from legolm.errors import LegolmError
from legolm.export.gguf_balance import Balance
from legolm.export.gguf_layout import Layout
from legolm.export.gguf_tokens import Vocabulary
from legolm.models import LayeredModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Quant = Literal["f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}
"""llama.cpp's numbers of what most of a file is in."""
RUN = 32
"""Weights of a row that are quantized together."""
OUTER = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"
HEADS = ("lm_head.weight", "embed_out.weight")
LARGEST_F16 = 65504.0
BALANCED = "legolm.balanced"
"""Metadata, of a model and of an adapter: each fits only one of its kind."""


@dataclass
class Written:
    """What a file holds: bytes by kind of number, and what of it was to be quantized and could not be."""

    bytes_of: dict[str, int]
    odd: dict[str, int]

    def notes(self) -> list[str]:
        """What is to be said of it."""
        if not self.odd:
            return []
        size, all_bytes = sum(self.odd.values()), sum(self.bytes_of.values())
        names = sorted({name.split(".", 2)[-1].removesuffix(".weight") for name in self.odd})
        return [
            f"{', '.join(names)}: rows are no multiple of {RUN} and stay f16, {size / all_bytes:.0%} of the file; "
            f"blocks whose widths are multiples of {RUN} quantize whole"
        ]


def write_gguf(
    path: Path,
    out: Path,
    layout: Layout,
    vocabulary: Vocabulary,
    quant: Quant,
    name: str,
    balance: Balance,
    embeddings: Quant | None = None,
) -> Written:
    """Write the checkpoint at `path`. Raises `LegolmError` for a weight that float16 cannot hold.

    `embeddings` (and the head): below 8 bits these, which suffer most, are q8_0 if nothing else is wanted.
    """
    import gguf

    model = LayeredModel(path)
    writer = gguf.GGUFWriter(out, layout.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_named(name, vocabulary.strips))
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_bool(BALANCED, bool(balance.scales))
    for key, value in layout.metadata.items():
        kinds_of_value: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add = kinds_of_value[type(value)]
        add(f"{layout.arch}.{key}", value)
    _add_vocabulary(writer, vocabulary)
    kinds, written = {}, Written({}, {})
    outer = embeddings or (quant if quant in ("f32", "f16") else "q8_0")
    for tensor_name, tensor in _tensors(model, layout, weights=False):
        kind = kinds[tensor_name] = _kind(tensor_name, tensor, outer if tensor_name in OUTER else quant, written)
        rows = gguf.quants.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
        size = int(torch.tensor(rows).prod())
        written.bytes_of[kind.name] = written.bytes_of.get(kind.name, 0) + size
        if tensor_name in written.odd:
            written.odd[tensor_name] = size
        writer.add_tensor_info(tensor_name, tuple(tensor.shape), _float32(), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor_name, tensor in _tensors(model, layout, weights=True):
        kind, whole = kinds[tensor_name], balance.weight(tensor_name, tensor.float()).contiguous()
        if kind is not gguf.GGMLQuantizationType.F32 and float(whole.abs().max()) > LARGEST_F16:
            raise LegolmError(
                f"{name}: {tensor_name} has weights beyond {LARGEST_F16:.0f}, the largest of f16; take --quant f32"
            )
        writer.write_tensor_data(gguf.quants.quantize(whole.numpy(), kind))
    writer.close()
    return written


def write_lora(
    factors: dict[str, tuple[Tensor, Tensor]], layout: Layout, out: Path, name: str, balance: Balance
) -> None:
    """Write an adapter: (A, B) by the name of the weight as a checkpoint has it, the scale in B.

    `balance` is that of the block that it is for.
    """
    import gguf

    writer = gguf.GGUFWriter(out, layout.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {len(a) for a, _ in factors.values()}
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(max(ranks)))
    writer.add_bool(BALANCED, bool(balance.scales))
    for weight, (a, b) in factors.items():
        for part, rows in layout.tensors(weight, b):
            # llama.cpp multiplies by alpha over the rank of each.
            scaled = balance.rows(part, rows.float()) * (len(a) / max(ranks))
            writer.add_tensor(f"{part}.lora_a", balance.columns(part, a.float()).contiguous().numpy())
            writer.add_tensor(f"{part}.lora_b", scaled.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("llama" if vocabulary.pieces else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.pieces:
        writer.add_token_scores([vocabulary.pieces.scores.get(token, 0.0) for token in vocabulary.tokens])
        writer.add_add_space_prefix(vocabulary.pieces.prefix)
    else:
        writer.add_token_merges(vocabulary.merges or [f"{vocabulary.tokens[0]} {vocabulary.tokens[0]}"])  # wants some
    for kind, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", index)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(False)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _named(name: str, strips: bool) -> str:
    """With Phi-3 in it or not: by that alone llama.cpp knows that special tokens take the blanks behind them."""
    if not strips:
        return re.sub("(?i)phi-?3", "phi 3", name)
    return name if re.search("(?i)phi-?3", name) else f"{name} (phi-3)"


def _tensors(model: LayeredModel, layout: Layout, weights: bool) -> Iterator[tuple[str, Tensor]]:
    """All that the file holds, in its order; without `weights` shapes alone."""
    for name, tensor in model.around():
        if not (layout.tied and name in HEADS):
            yield from layout.tensors(name, tensor if weights else tensor.to("meta"))
    if layout.frequencies is not None:
        yield "rope_freqs.weight", layout.frequencies
    for index, empty in enumerate(model.layers):
        with model.layer(index) if weights else nullcontext(empty) as layer:
            for name, tensor in layer.state_dict().items():
                turned = layout.shape.entry.transposed and name.removesuffix(".weight") in layout.shape.modules
                yield from layout.tensors(model.layer_prefix(index) + name, tensor.T if turned else tensor)


def _kind(name: str, tensor: Tensor, quant: Quant, written: Written) -> GGMLQuantizationType:
    """In what a tensor is written: vectors and positions in float32, rows that cannot be quantized in float16."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or quant == "f32" or name == POSITIONS:
        return kinds.F32
    if quant == "f16":
        return kinds.F16
    if tensor.shape[-1] % RUN:
        written.odd[name] = 0
        return kinds.F16
    return kinds[quant.upper()]


def _float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)
