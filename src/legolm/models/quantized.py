"""Quantized checkpoints: what each format stores of a linear layer, and the float32 weight that it stands for.

Each format is a few lines on one layer's tensors, in what their own tools write; no GPU kernels are needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legolm.errors import LegolmError, brief
from legolm.models.checkpoint import MAX_CONFIG, read_object

Parts = Mapping[str, Tensor]
"""A layer's tensors by the end of their names."""
Settings = Mapping[str, Any]
"""`quantization_config` of config.json."""
HELP = "load it with the library that made it, save it with save_pretrained after model.dequantize(), and give that"


@dataclass(frozen=True)
class Format:
    """`parts` are ends of names of a quantized layer's tensors, the first of them in `marks` there for each one.

    `weight` makes (rows, columns) float32 of them. `unused` belong to the layer and say nothing of its weight.
    """

    marks: tuple[str, ...]
    parts: tuple[str, ...]
    weight: Callable[[Parts, Settings], Tensor]
    unused: tuple[str, ...] = ()


def settings_of(path: Path, config: Any) -> Settings | None:
    """How a checkpoint was quantized, from its config or the files of older tools; None where it was not."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if found is not None:
        return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())
    if (path / "quantize_config.json").is_file():  # AutoGPTQ and AutoAWQ of old
        found = read_object(path / "quantize_config.json", MAX_CONFIG)
        return {"quant_method": "awq" if "zero_point" in found else "gptq"} | found
    if (path / "hf_quant_config.json").is_file():  # NVIDIA's ModelOpt
        found = read_object(path / "hf_quant_config.json", MAX_CONFIG).get("quantization")
        return {"quant_method": "modelopt"} | (found if isinstance(found, dict) else {})
    return None


def format_of(settings: Settings) -> Format:
    """Raises `LegolmError` for a format that is none of these."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    layout = settings.get("format") or settings.get("checkpoint_format") or settings.get("version")
    what = f"{method}{f', {layout}' if layout else ''}"
    if method == "gptq" and settings.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2"):
        return GPTQ
    if method == "awq" and str(settings.get("version", "gemm")).lower() == "gemm":
        return AWQ
    if method in ("fp8", "fbgemm_fp8"):
        return SCALED
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return SCALED
    if method == "bitsandbytes":
        return BNB8 if settings.get("load_in_8bit") or settings.get("_load_in_8bit") else BNB4
    groups = settings.get("transform_config") or {}
    if groups.get("config_groups") if isinstance(groups, Mapping) else groups:  # its weights are other ones
        method, what = "", f"{what}, rotated"
    if method == "compressed-tensors" and layout in ("float-quantized", "int-quantized", "naive-quantized"):
        return SCALED
    if method == "compressed-tensors" and layout == "pack-quantized":
        return PACKED
    raise LegolmError(f"model: is quantized ({brief(json.dumps(what))[1:-1]}), which cannot be undone here; {HELP}")


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned numbers of so many bits, one after the other from the lowest bit on, that int32 hold along `dim`.

    (.., n, ..) int32 -> (.., 32 n / bits, ..) int32.
    """
    moved = packed.movedim(dim, -1)[..., None]
    if 32 % bits == 0:
        numbers = (moved >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1).flatten(-2)
    else:  # some lie across two int32
        stream = (moved >> torch.arange(32, dtype=torch.int32) & 1).reshape(
            *packed.movedim(dim, -1).shape[:-1], -1, bits
        )
        numbers = (stream << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return numbers.movedim(-1, dim)


def _gptq(parts: Parts, settings: Settings) -> Tensor:
    """Frantar et al., arXiv 2210.17323, as AutoGPTQ stores it: one less than the zeros, columns in any order."""
    bits = _whole(settings, "bits", (2, 3, 4, 8))
    numbers = unpack(parts["qweight"], bits, 0)  # (columns, rows)
    zeros = unpack(parts["qzeros"], bits, 1)[:, : numbers.shape[1]]  # (groups, rows)
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1 & (1 << bits) - 1
    group = _groups(len(numbers), len(parts["scales"]), settings.get("group_size"), parts.get("g_idx"))
    return ((numbers - zeros[group]) * parts["scales"].float()[group]).T


def _groups(columns: int, groups: int, size: object, named: Tensor | None = None) -> Tensor:
    """The group of each column: so many one after the other (as many in each, where no `size` is told), unless all have
    a name; of some tools -1 is none."""
    if named is None or bool((named == -1).any()):
        each = size if isinstance(size, int) and 0 < size < columns else -(-columns // max(1, groups))
        if -(-columns // each) != groups:
            raise LegolmError(f"group_size is {size}, and {columns} columns have {groups} scales")
        return torch.arange(columns) // each
    if named.shape != (columns,) or bool(((named < 0) | (named >= groups)).any()):
        raise LegolmError("g_idx names groups that are not there")
    return named.long()


def _awq(parts: Parts, settings: Settings) -> Tensor:
    """Lin et al., arXiv 2306.00978, as AutoAWQ's `gemm` stores it: eight numbers an int32, in its kernels' order."""
    bits = settings.get("w_bit", settings.get("bits", 4))
    if bits != 4:
        raise LegolmError(f"bits is {bits!r}, and AWQ has 4")
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    numbers, zeros = (  # (columns, rows), (groups, rows)
        unpack(parts[name], 4, 1).reshape(len(parts[name]), -1, 8)[..., order].flatten(1)
        for name in ("qweight", "qzeros")
    )
    group = _groups(len(numbers), len(zeros), settings.get("group_size", settings.get("q_group_size")))
    return ((numbers - zeros[group]) * parts["scales"].float()[group]).T


def _scaled(parts: Parts, settings: Settings) -> Tensor:
    """Numbers of 8 bits times a scale for all, each row, or each block of the matrix."""
    weight, scale = parts["weight"].float(), parts.get("weight_scale_inv", parts.get("weight_scale"))
    assert scale is not None
    if "weight_zero_point" in parts:
        weight = weight - _spread(parts["weight_zero_point"].float(), weight, settings)
    # Of one byte without a sign: exponents of two.
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    return weight * _spread(scale, weight, settings)


def _spread(scale: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """A scale for all, (rows,), or (row blocks, column blocks), in the shape of the weight or one that fits it."""
    if scale.numel() == 1:
        return scale.reshape(())
    rows, columns = weight.shape
    scale = scale[:, None] if scale.dim() == 1 else scale
    # Without blocks for each row, or for all of them; of columns there may be groups.
    sizes = settings.get("weight_block_size") or (1 if len(scale) == rows else rows, -(-columns // scale.shape[1]))
    if scale.shape != tuple(-(-n // size) for n, size in zip(weight.shape, sizes, strict=True)):
        raise LegolmError(f"its scale {list(scale.shape)} does not fit its shape {list(weight.shape)}")
    return scale[torch.arange(rows) // sizes[0]][:, torch.arange(columns) // sizes[1]]


def _packed(parts: Parts, settings: Settings) -> Tensor:
    """compressed-tensors' `pack-quantized`: signed numbers as unsigned ones from 0 on, side by side in int32."""
    weights = [group.get("weights", {}) for group in settings.get("config_groups", {}).values()]
    (bits,) = {one.get("num_bits") for one in weights} or {None}
    sizes = {one.get("group_size") for one in weights}
    size = sizes.pop() if len(sizes) == 1 else None  # of several kinds it is not told which this one is
    bits = _whole({"num_bits": bits}, "num_bits", (4, 8))
    rows, columns = parts["weight_shape"].tolist()
    half, scale = 1 << bits - 1, parts["weight_scale"].float()
    numbers = unpack(parts["weight_packed"], bits, 1)[:, :columns] - half
    if numbers.shape != (rows, columns):
        raise LegolmError(f"weight_shape is {[rows, columns]}, and {list(numbers.shape)} numbers are packed")
    group = _groups(numbers.shape[1], scale.shape[1], size, parts.get("weight_g_idx"))
    if "weight_zero_point" in parts:
        numbers = numbers - (unpack(parts["weight_zero_point"], bits, 0)[:rows] - half)[:, group]
    return numbers * scale[:, group]


def _bnb4(parts: Parts, settings: Settings) -> Tensor:
    """Dettmers et al., arXiv 2305.14314: NF4 or FP4 codes, two a byte, a largest size a block, itself in 8 bits."""
    name = next(name for name in parts if "quant_state" in name)
    try:
        state = json.loads(bytes(parts[name].tolist()))
        shape, size, nested = state["shape"], int(state["blocksize"]), "nested_offset" in state
        largest = parts["weight.absmax"].float()
        if nested:
            scales = parts["weight.nested_absmax"][torch.arange(len(largest)) // int(state["nested_blocksize"])]
            largest = parts["weight.nested_quant_map"][largest.long()] * scales + state["nested_offset"]
    except (ValueError, TypeError, KeyError) as error:
        raise LegolmError(f"its quant_state is broken ({brief(error)})") from None
    packed = parts["weight"].flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().int()
    values = parts["weight.quant_map"].float()[codes].reshape(-1, size) * largest[:, None]
    return values.reshape(shape)


def _bnb8(parts: Parts, settings: Settings) -> Tensor:
    """Dettmers et al., arXiv 2208.07339: 127ths of each row's largest size."""
    if "weight_format" in parts and int(parts["weight_format"]) != 0:
        raise LegolmError("its columns are in an order of a GPU")
    return parts["weight"].float() * (parts["SCB"].float() / 127)[:, None]


def _whole(settings: Settings, name: str, known: tuple[int, ...]) -> int:
    value = settings.get(name)
    if value not in known:
        raise LegolmError(f"{name} is {value!r}, and must be one of {', '.join(map(str, known))}")
    return int(value)


CACHE = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale", "kv_scale")
"""Of the keys and values that an engine keeps in 8 bits."""
GPTQ = Format(("qweight",), ("qweight", "qzeros", "scales", "g_idx"), _gptq)
AWQ = Format(("qweight",), ("qweight", "qzeros", "scales"), _awq)
SCALED = Format(
    ("weight_scale_inv", "weight_scale"),
    ("weight", "weight_scale_inv", "weight_scale", "weight_zero_point"),
    _scaled,
    ("input_scale", "activation_scale", "input_scale_ub", "input_zero_point", *CACHE),
)
PACKED = Format(
    ("weight_packed",),
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    _packed,
    SCALED.unused,
)
BNB4 = Format(
    ("weight.absmax",),
    (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    ),
    _bnb4,
)
BNB8 = Format(("SCB",), ("weight", "SCB", "weight_format"), _bnb8)
