"""Recovery after the cut: a short distillation from the LLM on public text, merged into the block.

Merely pruned blocks spend their first rounds repairing themselves; recovered ones learn the task (DESIGN section 3).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from legolm.config import BlockConfig, Precision
from legolm.coverage import Coverage, init_factors, slice_factors
from legolm.data import Tokens, calibration_tokens
from legolm.finetune import Head, divergences, dtype_of, hidden_states, lean, lora, merge, pack
from legolm.memory import keep_freed_memory
from legolm.models import load_model

SCALE = 2.0
AT_ONCE = 1024
"""Tokens of one forward and backward pass."""


def recover(
    model: Any,
    coverage: Coverage,
    base: Path,
    tokenizer: Any,
    spec: BlockConfig,
    precision: Precision,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Train a LoRA on KL(LLM ‖ block) per token and merge it under the mask, in place.

    Returns the first and last divergence (nats per token, mean of up to four steps). Calls progress(1) each step.
    """
    recipe = spec.recover
    per_step = recipe.batch_size
    # Another seed than calibration's: recovery should see text that the cut was not fitted on.
    wanted = spec.calibration.model_copy(update={"samples": recipe.steps * per_step})
    tokens = calibration_tokens(wanted, tokenizer, seed + 1)
    start = slice_factors(coverage, init_factors(coverage.shape, None, recipe.rank, seed), recipe.rank)
    full = Coverage.full(coverage.shape)
    teacher = load_model(base, dtype_of(precision)).to(model.device)
    found: list[float] = []
    began = time.perf_counter()
    with (
        keep_freed_memory(),
        lora(teacher, full, {}, SCALE, precision),
        lora(model, coverage, start, SCALE, precision) as parameters,
        lean(teacher, precision),
        lean(model, precision),
    ):
        head, teacher_head = Head.of(model, precision), Head.of(teacher, precision)
        optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps, recipe.learning_rate / 10)
        for step in range(recipe.steps):
            batch = tokens[step * per_step : (step + 1) * per_step]
            total = 0.0
            for part in torch.split(batch, max(1, AT_ONCE // batch.shape[1])):
                packing = pack([Tokens(tuple(window.tolist()), 1) for window in part], model.device)
                with torch.no_grad():
                    wish = hidden_states(teacher, packing)
                loss = divergences(hidden_states(model, packing), head, wish, teacher_head).sum() / batch.numel()
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            found.append(total)
            progress(1)
        learnt = {key: parameter.detach().cpu() for key, parameter in parameters.items()}
    merge(model, coverage, learnt, SCALE)
    window = min(4, len(found))
    return {
        "kl_first": sum(found[:window]) / window,
        "kl_last": sum(found[-window:]) / window,
        "seconds": time.perf_counter() - began,
    }
