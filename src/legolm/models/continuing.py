"""What a model goes on with, by the settings that are given and none of its checkpoint's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


@torch.no_grad()
def continued(
    model: Any, ids: Tensor, most: int, mask: Tensor | None = None, streamer: Any = None, **how: Any
) -> Tensor:
    """`ids` (rows, length) and behind them at most `most` tokens, where `mask` is 0 for padding: the likeliest token
    each time, or as `how`, settings of transformers' generation, says.

    What these leave open transformers would take from `generation_config.json`: penalties of repetition, for instance.
    """
    holders = [one for one in model.modules() if "generation_config" in vars(one)]  # PEFT's wrapper has the model's
    own = [one.generation_config for one in holders]
    for one in holders:
        one.generation_config = GenerationConfig()
    try:
        found: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            generation_config=GenerationConfig(max_new_tokens=most, use_cache=True, **how),
            streamer=streamer,
        )
    finally:
        for one, its in zip(holders, own, strict=True):
            one.generation_config = its
    return found
