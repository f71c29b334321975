"""Adapters on disk in PEFT's format: written for `PeftModel.from_pretrained` on the block, read as a run's start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from legolm.coverage import Coverage, factor_key, parse_key
from legolm.models import FAMILIES, Shape
from legolm.types import LegolmError, Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(coverage: Coverage, factors: Tensors, scale: float, base: str, path: Path) -> None:
    """Write the adapter of a block; `base` is the block's folder or hub id.

    Raises `LegolmError` for an unstructured block: PEFT would compute the unmasked product, another function.
    """
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


def load_adapter(path: Path, into: Tensors, shape: Shape, scale: float) -> Tensors:
    """A run's start: `into` (the usual start, rank r) with a PEFT LoRA of the LLM in its first rank rows.

    The adapter's own scale goes into B. Raises `LegolmError` for what is no plain LoRA (DoRA, modules_to_save, biases),
    for modules that do not train, ranks above r and shapes of another model.
    """
    config = _read_config(path)
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise LegolmError(f"lora.start {path}: no readable {WEIGHTS} ({error})") from None
    factors = {key: tensor.clone() for key, tensor in into.items()}
    for name, tensor in tensors.items():
        key, module = _key_of(name, path, shape)
        if key not in factors:
            raise LegolmError(f"lora.start {path}: has an adapter on {module}, which lora.targets leaves out; add it")
        whole, side = factors[key], key[-1]
        rank, size = (tensor.shape[0], tensor.shape[1]) if side == "A" else (tensor.shape[1], tensor.shape[0])
        most, wanted = (whole.shape[0], whole.shape[1]) if side == "A" else (whole.shape[1], whole.shape[0])
        if size != wanted:
            raise LegolmError(f"lora.start {path}: {name} is for {size} features; the model has {wanted}")
        if rank > most:
            raise LegolmError(f"lora.start {path}: {module} has rank {rank}; raise lora.rank (now {most}) to it")
        if side == "A":
            whole[:rank] = tensor.float()
        else:
            whole[:, :rank] = tensor.float() * (_scale_of(config, module, rank) / scale)
    return factors


def _prefix(shape: Shape) -> str:
    return f"base_model.model.{FAMILIES[shape.family].layers}."


def _key_of(name: str, path: Path, shape: Shape) -> tuple[str, str]:
    """(factor key, module) of a tensor's name."""
    layer, _, rest = name.removeprefix(_prefix(shape)).partition(".")
    module, _, side = rest.removesuffix(".weight").rpartition(".lora_")
    if not name.startswith(_prefix(shape)) or not layer.isdecimal() or module not in shape.modules:
        raise LegolmError(f"lora.start {path}: {name} is not a LoRA factor of a linear layer of {shape.family!r}")
    return factor_key(int(layer), module, side), module


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LegolmError(f"lora.start {path}: no readable {CONFIG} ({error}); give a PEFT adapter's folder") from None
    if config.get("peft_type") != "LORA":
        raise LegolmError(f"lora.start {path}: is {config.get('peft_type')}; only LoRA adapters can be averaged")
    for field, plain in (("use_dora", False), ("modules_to_save", None), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(field, plain) not in (plain, [], None):
            raise LegolmError(
                f"lora.start {path}: {field} is {config[field]!r}; such an adapter is more than B·A and cannot be "
                f"averaged; train one with {field} {plain!r}"
            )
    return config


def _scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B·A of a module by."""
    own = [alpha for name, alpha in (config.get("alpha_pattern") or {}).items() if f".{module}".endswith(f".{name}")]
    alpha = float(own[0] if own else config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
