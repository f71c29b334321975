"""The local training loop: AdamW on LoRA factors, loss on answer tokens only."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from legolm.config import Precision, TrainConfig
from legolm.coverage import Coverage
from legolm.data import Batch, Tokens, batch
from legolm.finetune.lora import lora
from legolm.types import LegolmError, Tensors


def fit(
    model: Any,
    coverage: Coverage,
    start: Tensors,
    scale: float,
    examples: Sequence[Tokens],
    pad_id: int,
    config: TrainConfig,
    precision: Precision,
    steps: int,
    seed: int,
    done: int = 0,
    total: int | None = None,
    frozen: Collection[str] = (),
    proximal: float = 0.0,
) -> tuple[Tensors, dict[str, float]]:
    """Train the adapter `start` for some steps; return (change of each factor, metrics).

    The learning rate is constant, and falls linearly to zero over the last half of `total` steps (these steps, if not
    given), of which the client made `done` before. Factors in `frozen` do not train and are not in the change;
    `proximal` is FedProx's μ, the weight of ½ ‖change‖² in the loss.
    Metrics: `loss_first` and `loss_last` (nats per answer token, over up to eight steps), `tokens` and `seconds`.
    The seed decides the order of examples. Raises `LegolmError` when the loss stops being finite.
    """
    losses: list[float] = []
    tokens = 0
    began = time.perf_counter()
    order = _order(len(examples), config.batch_size, seed)
    with lora(model, coverage, start, scale) as adapted:
        parameters = {key: parameter for key, parameter in adapted.items() if key not in frozen}
        for key in frozen:
            adapted[key].requires_grad_(False)
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
        whole = total or steps
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - (done + step) / whole)))
        for _, chosen in zip(range(steps), order, strict=False):
            inputs = batch([examples[i] for i in chosen], pad_id)
            with autocast(precision):
                loss = answer_loss(model, inputs) / (inputs.labels != -100).sum()
            if not bool(loss.isfinite()):
                raise LegolmError(f"train.learning_rate {config.learning_rate}: the loss is not finite; lower it")
            if proximal:
                loss = loss + proximal / 2 * sum((p - start[key]).square().sum() for key, p in parameters.items())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            tokens += int(inputs.attention_mask.sum())
        delta = {key: parameter.detach() - start[key] for key, parameter in parameters.items()}
    window = min(8, len(losses))
    return delta, {
        "loss_first": sum(losses[:window]) / window,
        "loss_last": sum(losses[-window:]) / window,
        "tokens": float(tokens),
        "seconds": time.perf_counter() - began,
    }


def answer_logits(model: Any, inputs: Batch) -> torch.Tensor:
    """Logits (n, kept, vocabulary) for the label positions only: the head is the dearest matrix of a small model."""
    output = model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        logits_to_keep=inputs.labels.shape[1] + 1,
    )
    logits: torch.Tensor = output.logits[:, :-1]
    return logits


def answer_loss(model: Any, inputs: Batch) -> torch.Tensor:
    """Sum of the loss (nats) over a batch's answer tokens."""
    logits = answer_logits(model, inputs).flatten(0, 1).float()
    return cross_entropy(logits, inputs.labels.flatten(), ignore_index=-100, reduction="sum")


def autocast(precision: Precision) -> AbstractContextManager[None]:
    """`bf16`: matrix products in bfloat16 by autocast; `fp32`: as the weights are."""
    context: AbstractContextManager[None] = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    return context


def _order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example indices: whole epochs, each shuffled anew; a batch may span two."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]
