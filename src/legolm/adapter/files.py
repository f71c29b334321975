"""Adapters on disk: in PEFT's format, for `PeftModel.from_pretrained` on the block, and as factors by key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from legolm.adapter.flat import Layout
from legolm.adapter.keys import Tensors, factor_key, parse_key
from legolm.adapter.plain import Plain, check_base, check_patterns
from legolm.block import Coverage
from legolm.errors import LegolmError, brief
from legolm.models import Shape
from legolm.system import open_tensors, read_bounded, strict_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FACTORS, FROZEN = "factors.safetensors", "frozen.safetensors"
OUTER = "base_model.model."
"""What PEFT puts before the names of a model."""
MAX_CONFIG = 1 << 20
"""Bytes of an adapter's config."""
MAX_RANK, MAX_ALPHA = 1 << 14, 1e6


def save_adapter(coverage: Coverage, factors: Tensors, scale: float, base: str, path: Path) -> None:
    """Write the adapter of a block; `base` is the block's folder or hub id.

    Raises `LegolmError` for an unstructured block: PEFT would compute the unmasked product, another function.
    """
    from peft import LoraConfig as PeftLoraConfig

    if coverage.masks:
        raise LegolmError(
            f"adapter {path}: an unstructured block's adapter works under its mask only; merge it instead"
        )
    ranks = {parse_key(key)[1]: tensor.shape[0] for key, tensor in factors.items() if key.endswith(".A")}
    most = max(ranks.values())
    own = {module: rank for module, rank in ranks.items() if rank != most}
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=most,
        lora_alpha=scale * most,  # type: ignore[arg-type]
        target_modules=sorted(ranks),
        rank_pattern=own,
        alpha_pattern={module: scale * rank for module, rank in own.items()},
        fan_in_fan_out=coverage.shape.entry.transposed,
        inference_mode=True,
    )
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    place = {layer: j for j, layer in enumerate(coverage.layers)}
    tensors = {}
    for key, tensor in factors.items():
        layer, module, side = parse_key(key)
        name = f"{_prefix(coverage.shape)}{place[layer]}.{module}.lora_{side}.weight"
        tensors[name] = tensor.contiguous()
    save_file(tensors, path / WEIGHTS)


def save_frozen(factors: Tensors, folder: Path) -> None:
    """The frozen factors of a run that are made of text, in a block's slice, beside its weights."""
    save_file({key: tensor.contiguous() for key, tensor in factors.items()}, folder / FROZEN)


def load_frozen(folder: Path, layout: Layout) -> Tensors:
    """What `save_frozen` wrote, the first rank rows of this layout. Raises `LegolmError` for anything else."""
    found: Tensors = {}
    with open_tensors(folder / FROZEN, "", "take the block that the run made") as handle:
        if set(handle.keys()) != set(layout.shapes):
            raise LegolmError(f"{folder / FROZEN}: has other factors than this run; take the block that the run made")
        for key, (rank, columns) in layout.shapes.items():
            tensor = handle.get_tensor(key)
            if tensor.dtype != torch.float32 or tensor.dim() != 2 or len(tensor) < rank or tensor.shape[1] != columns:
                raise LegolmError(f"{folder / FROZEN}: {key} is {tuple(tensor.shape)} {tensor.dtype}, not this block's")
            if not bool(tensor.isfinite().all()):
                raise LegolmError(f"{folder / FROZEN}: {key} is not finite")
            found[key] = tensor[:rank].contiguous()
    return found


def load_adapter(path: Path, into: Tensors, shape: Shape, scale: float) -> Tensors:
    """A run's start: `into` (the usual start, rank r) with a PEFT LoRA of the LLM in its first rank rows.

    The adapter's own scale goes into B. Raises `LegolmError` for what `read_adapter` refuses, for modules that do not
    train, ranks above r and shapes of another model.
    """
    where = f"lora.start {path}"
    factors = {key: tensor.clone() for key, tensor in into.items()}
    for key, tensor in read_adapter(path, Coverage.full(shape), where).items():
        _, module, side = parse_key(key)
        if key not in factors:
            raise LegolmError(f"{where}: has an adapter on {module}, which lora.targets leaves out; add it")
        whole = factors[key]
        rank, size = (tensor.shape[0], tensor.shape[1]) if side == "A" else (tensor.shape[1], tensor.shape[0])
        most, wanted = (whole.shape[0], whole.shape[1]) if side == "A" else (whole.shape[1], whole.shape[0])
        if size != wanted:
            raise LegolmError(f"{where}: {key} is for {size} features; the model has {wanted}")
        if rank > most:
            raise LegolmError(f"{where}: {module} has rank {rank}; raise lora.rank (now {most}) to it")
        if side == "A":
            whole[:rank] = tensor
        else:
            whole[:, :rank] = tensor / scale
    return factors


def read_adapter(path: Path, coverage: Coverage, where: str) -> Tensors:
    """Factors (float32) of a PEFT LoRA of a block; its scale goes into B, so that it changes weights by B·A.

    `where` begins errors. Raises `LegolmError` for what is more than B·A, goes on other weights than the base model's,
    or of which PEFT would leave something out (`Plain`).
    """
    plain = Plain(adapter_config(path, where), where, coverage.shape, len(coverage.layers))
    factors, modules = {}, {}
    with open_tensors(weights_file(path, where), f"{where}: ", "give a PEFT adapter's folder") as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            key, module = _key_of(name, where, coverage)
            factors[key] = _factor(handle, name)
            modules[key.rpartition(".")[0]] = module
    plain.check_modules(set(modules.values()))
    for key, module in modules.items():
        a, b = (factors.get(f"{key}.{side}") for side in "AB")
        if a is None or b is None:
            raise LegolmError(f"{where}: has only one of lora_A and lora_B of {module}; give the whole adapter")
        if (len(a), b.shape[1]) != (plain.rank(module), plain.rank(module)):
            raise LegolmError(
                f"{where}: {module} has rank {len(a)}, and adapter_config.json says {plain.rank(module)} (r, "
                "rank_pattern); give the config that PEFT wrote with it"
            )
        factors[f"{key}.B"] = b * plain.scale(module)
    return factors


def save_factors(factors: Tensors, scale: float, start: str, path: Path) -> None:
    """Write the factors of any block, unstructured ones too, into its folder: what `legolm compose` reads.

    `start` is the hash of the global adapter that training started from: factors of one start can be averaged.
    """
    header = json.dumps({"schema_number": 1, "scale": scale, "start": start})
    tensors = {key: tensor.contiguous() for key, tensor in factors.items()}
    save_file(tensors, path / FACTORS, metadata={"legolm": header})


def load_factors(path: Path) -> tuple[Tensors, str]:
    """(factors with the scale in B, hash of their start) from a block's folder. Raises `LegolmError`."""
    if not (path / FACTORS).exists():
        raise LegolmError(
            f"{path}: has no {FACTORS}; give RUN:CLIENT, a folder of a run's final/, or BLOCK:ADAPTER with a PEFT "
            "adapter's folder"
        )
    with open_tensors(path / FACTORS, "", "give a folder that legolm wrote") as handle:
        header = strict_json((handle.metadata() or {})["legolm"])
        scale, start = _finite(header["scale"]), str(header["start"])
        factors = {key: _factor(handle, key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        for key in factors:
            parse_key(key)
    return {key: tensor * scale if key.endswith(".B") else tensor for key, tensor in factors.items()}, start


def _factor(handle: Any, name: str) -> Tensor:
    """One tensor of a file, float32. Raises `ValueError` when it cannot be a factor."""
    tensor: Tensor = handle.get_tensor(name)
    if tensor.dim() != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, which no factor is")
    return tensor.float()


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number


def _prefix(shape: Shape) -> str:
    return f"{OUTER}{shape.entry.layers}."


def _key_of(name: str, where: str, coverage: Coverage) -> tuple[str, str]:
    """(factor key, module by its name in the model) of a tensor's name."""
    shape = coverage.shape
    layer, _, rest = name.removeprefix(_prefix(shape)).partition(".")
    module, _, side = rest.removesuffix(".weight").rpartition(".lora_")
    fits = layer.isdecimal() and len(layer) < 10 and module in shape.modules and side in ("A", "B")
    if not name.startswith(_prefix(shape)) or not fits:
        raise LegolmError(
            f"{where}: {brief(name)} is not a LoRA factor of a linear layer of {shape.family!r} as PEFT names it "
            f"({_prefix(shape)}0.{next(iter(shape.modules))}.lora_A.weight); load it with PEFT on this model and "
            "save_pretrained again"
        )
    if int(layer) >= len(coverage.layers):
        raise LegolmError(f"{where}: {name} is of another model, which has more than {len(coverage.layers)} layers")
    return factor_key(coverage.layers[int(layer)], module, side), name.removeprefix(OUTER).rpartition(".lora_")[0]


def weights_file(path: Path, where: str) -> Path:
    """An adapter's weights. Raises `LegolmError` where its folder has none, or a pickle."""
    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).exists():
            raise LegolmError(
                f"{where}: has {PICKLE}, a pickle, which can run any code; load it with PEFT where you trust it and "
                f"save_pretrained again, which writes {WEIGHTS}"
            )
        raise LegolmError(f"{where}: {path / WEIGHTS}: no such file; give a PEFT adapter's folder")
    return path / WEIGHTS


def adapter_config(path: Path, where: str) -> dict[str, Any]:
    """What a PEFT adapter's folder says of it, of any kind.

    Raises `LegolmError`, which begins with `where`, also where it goes on other weights than the base model's.
    """
    try:
        config = strict_json(read_bounded(path / CONFIG, MAX_CONFIG).decode())
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
        for field, most in (("alpha", MAX_ALPHA), ("rank", MAX_RANK)):
            whole = {"alpha": "lora_alpha", "rank": "r"}[field]
            own = config.get(f"{field}_pattern") or {}
            given = {whole: config[whole]} if config.get(whole) is not None else {}
            for name, value in (given | own).items():
                unused = value == 0 and config.get("peft_type") != "LORA"  # OFT's r
                if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value <= most or unused):
                    raise ValueError(f"{name} is {brief(json.dumps(value))}; must be a number up to {most}")
        check_patterns(config)
    except (OSError, ValueError, TypeError) as error:
        raise LegolmError(f"{where}: no readable {CONFIG} ({brief(error)}); give a PEFT adapter's folder") from None
    check_base(config, where)
    return config
