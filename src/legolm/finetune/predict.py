"""The plain forward pass, for evaluation: the model as it is, padded batches, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from legolm.config import Precision
from legolm.data import Batch


def answer_logits(model: Any, inputs: Batch) -> torch.Tensor:
    """Logits (n, kept, vocabulary) for the label positions only: the head is the dearest matrix of a small model."""
    output = model(
        input_ids=inputs.input_ids.to(model.device),
        attention_mask=inputs.attention_mask.to(model.device),
        position_ids=inputs.position_ids.to(model.device),
        logits_to_keep=inputs.labels.shape[1] + 1,
    )
    logits: torch.Tensor = output.logits[:, :-1]
    return logits


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[None]:
    """`bf16`: matrix products in bfloat16 by autocast; `fp32`: as the weights are."""
    context: AbstractContextManager[None] = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
    return context
