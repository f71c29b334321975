"""LoRA (Hu et al., arXiv 2106.09685) on a block through PEFT, and merging it.

A block keeps its sparsity: it trains and merges M ∘ (W + s·B·A), M the block's mask of kept weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from legolm.coverage import Coverage, factor_key, parse_key
from legolm.finetune.masked import mask_forward, merged_weight
from legolm.models import decoder_layers
from legolm.types import Tensors


@contextmanager
def lora(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> Iterator[dict[str, nn.Parameter]]:
    """Put an adapter on the block for as long as the context lasts.

    Yields the trainable factors, by factor key, float32. Afterwards the model is as it was: nothing is merged.
    """
    rank = next(tensor.shape[0] for key, tensor in factors.items() if key.endswith(".A"))
    modules = sorted({parse_key(key)[1] for key in factors})
    settings = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules=modules,
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    inject_adapter_in_model(settings, model)
    parameters: dict[str, nn.Parameter] = {}
    for layer, module, adapted in _linears(model, coverage, factors):
        for side, linear in (("A", adapted.lora_A["default"]), ("B", adapted.lora_B["default"])):
            key = factor_key(layer, module, side)
            linear.weight.data = factors[key].clone()
            parameters[key] = linear.weight
        mask = coverage.mask(layer, module)
        if mask is not None:
            mask_forward(adapted, mask)
    try:
        yield parameters
    finally:
        for block_layer in decoder_layers(model):
            for module in modules:
                parent, _, name = module.rpartition(".")
                setattr(block_layer.get_submodule(parent), name, block_layer.get_submodule(module).base_layer)
        del model.peft_config


def merge(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> None:
    """Merge an adapter into the block in place: W ← M ∘ (W + s·B·A)."""
    for layer, module, linear in _linears(model, coverage, factors):
        a, b = (factors[factor_key(layer, module, side)] for side in "AB")
        old = linear.weight.data
        linear.weight.data = merged_weight(old, a, b, scale, coverage.mask(layer, module)).to(old.dtype)


@contextmanager
def merged(model: Any, coverage: Coverage, factors: Tensors, scale: float) -> Iterator[Any]:
    """The block as it would be deployed with this adapter; afterwards it is as it was, bit for bit."""
    before = [(linear, linear.weight.data) for _, _, linear in _linears(model, coverage, factors)]
    merge(model, coverage, factors, scale)
    try:
        yield model
    finally:
        for linear, weight in before:
            linear.weight.data = weight


def _linears(model: Any, coverage: Coverage, factors: Tensors) -> Iterator[tuple[int, str, Any]]:
    """(LLM layer, module, linear layer) of all that an adapter touches."""
    modules = sorted({parse_key(key)[1] for key in factors})
    for index, layer in zip(coverage.layers, decoder_layers(model), strict=True):
        for module in modules:
            yield index, module, layer.get_submodule(module)
