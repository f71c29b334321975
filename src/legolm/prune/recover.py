"""Recovery after the cut: a short distillation from the LLM on public text, merged into the block.

Merely pruned blocks spend their first rounds repairing themselves; recovered ones learn the task (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from legolm.config import BlockConfig, Precision
from legolm.coverage import Coverage, init_factors, slice_factors
from legolm.data import calibration_tokens
from legolm.finetune import autocast, lora, merge
from legolm.models import load_model

SCALE = 2.0


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
    teacher = load_model(base)
    start = slice_factors(coverage, init_factors(coverage.shape, None, recipe.rank, seed), recipe.rank)
    divergences: list[float] = []
    with lora(model, coverage, start, SCALE) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps, recipe.learning_rate / 10)
        for step in range(recipe.steps):
            chunk = tokens[step * per_step : (step + 1) * per_step]
            with autocast(precision):
                with torch.no_grad():
                    target = log_softmax(teacher(input_ids=chunk).logits.flatten(0, 1).float(), -1)
                own = log_softmax(model(input_ids=chunk).logits.flatten(0, 1).float(), -1)
            loss = kl_div(own, target, log_target=True, reduction="batchmean")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            divergences.append(float(loss.detach()))
            progress(1)
        learnt = {key: parameter.detach() for key, parameter in parameters.items()}
    merge(model, coverage, learnt, SCALE)
    window = min(4, len(divergences))
    return {"kl_first": sum(divergences[:window]) / window, "kl_last": sum(divergences[-window:]) / window}
