"""Recovery after the cut: a short distillation from the LLM on public text.

Merely pruned blocks spend their first rounds repairing themselves; recovered ones learn the task.
The LLM is the teacher in the same process (Hinton et al., arXiv 1503.02531; Muralidharan et al., "Compact language
models via pruning and knowledge distillation", arXiv 2407.14679, for pruned LLMs).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from legolm.adapter import init_factors, merge, slice_factors
from legolm.block import Coverage
from legolm.config import BlockConfig, CalibrationConfig, Precision, RecoverConfig
from legolm.data import Tokens, calibration_tokens, check_length, check_samples
from legolm.errors import LegolmError
from legolm.finetune import lora, whole
from legolm.models import Head, divergences, dtype_of, hidden_states, lean, load_model, pack, shape_of
from legolm.system import keep_freed_memory

SCALE = 2.0
AT_ONCE = 2048
"""Tokens of one forward and backward pass."""
WINDOW = 4
"""Steps that the first and the last divergence are the mean of."""


class Teacher:
    """The LLM, asked for its hidden states on text. With `room` (bytes) it keeps them and reads the same text once.

    They are kept in the dtype in which its head takes them: what is kept is what would be computed again.
    """

    def __init__(self, model: Any, precision: Precision, room: int) -> None:
        self.head, self.device = Head.of(model, precision), model.device
        self._model, self._room = model, room
        self._kept: dict[bytes, Tensor] = {}

    def states(self, windows: Tensor, packing: Any) -> Tensor:
        """(tokens, hidden) after the last norm for windows of text (n, length), packed."""
        key = hashlib.sha256(windows.numpy().tobytes()).digest()
        found = self._kept.get(key)
        if found is None:
            with torch.no_grad():
                found = hidden_states(self._model, packing).to(self.head.weight.dtype)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[key] = found
        return found


@contextmanager
def teacher_of(base: Path, precision: Precision, device: torch.device, blocks: int) -> Iterator[Teacher | None]:
    """The LLM for so many blocks to recover. For several it keeps states of at most half its own size."""
    if not blocks:
        yield None
        return
    model = load_model(base, dtype_of(precision)).to(device)
    room = sum(one.nbytes for one in model.parameters()) // 2 if blocks > 1 else 0
    with lora(model, Coverage.full(shape_of(model.config)), {}, SCALE, precision), lean(model, precision):
        yield Teacher(model, precision, room)


def recover(
    model: Any,
    coverage: Coverage,
    teacher: Teacher,
    tokenizer: Any,
    spec: BlockConfig,
    precision: Precision,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Train the block on KL(LLM ‖ block) per token, in place and under its mask.

    The learning rate falls linearly to zero. Returns the first and last divergence (nats per token, mean of up to four
    steps), steps, tokens and seconds. Calls progress(1) each step.
    """
    recipe = spec.recover
    windows = _windows(spec, tokenizer, seed)
    found: list[float] = []
    with (
        keep_freed_memory(),
        trainable(model, coverage, recipe, precision, seed) as parameters,
        lean(model, precision),
    ):
        head = Head.of(model, precision)
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
        began = time.perf_counter()  # not before: the minutes are for the steps
        for _ in range(recipe.most_steps):
            left = 1 - _share_done(recipe, len(found), began) if found else 1.0
            if left <= 0:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * left
            batch = torch.stack(list(itertools.islice(windows, recipe.batch_size)))
            found.append(_backward(model, head, teacher, batch))
            norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(found[-1] + norm):
                raise LegolmError(
                    f"block {spec.name}: recover.learning_rate {recipe.learning_rate:g}: the loss is not finite at "
                    f"step {len(found)}; lower it"
                )
            optimizer.step()
            optimizer.zero_grad()
            progress(1)
    first, last = found[:WINDOW], found[-WINDOW:]
    return {
        "kl_first": sum(first) / len(first),
        "kl_last": sum(last) / len(last),
        "steps": len(found),
        "tokens": len(found) * recipe.batch_size * spec.calibration.length,
        "seconds": time.perf_counter() - began,
    }


def _windows(spec: BlockConfig, tokenizer: Any, seed: int) -> Iterator[Tensor]:
    """Endless windows of text (length,), all before any comes again."""
    text, field = _text(spec, spec.recover.most_steps * spec.recover.batch_size)
    # Another seed than calibration's: recovery should see text that the cut was not fitted on.
    return itertools.cycle(calibration_tokens(text, tokenizer, seed + 1, fewer=True, field=field))


def _text(spec: BlockConfig, samples: int) -> tuple[CalibrationConfig, str]:
    """What a block recovers on, and the section that says so."""
    wanted = {"samples": samples, "text": spec.recover.text or spec.calibration.text}
    section = "recover" if spec.recover.text else "calibration"
    return spec.calibration.model_copy(update=wanted), f"block {spec.name}: {section}"


def check_recovery(specs: Iterable[BlockConfig], tokenizer: Any, seed: int, context: int) -> None:
    """Raise `LegolmError` where blocks would have no text to recover on, or longer samples than the LLM takes."""
    fields: dict[CalibrationConfig, str] = {}
    for spec in specs:
        if spec.recover.most_steps:
            check_length(spec.calibration.length, context, f"block {spec.name}: calibration")
            text, field = _text(spec, 1)
            fields.setdefault(text, field)
    for text, field in fields.items():
        check_samples(text, tokenizer, seed, field, fewer=True)


@contextmanager
def trainable(
    model: Any, coverage: Coverage, recipe: RecoverConfig, precision: Precision, seed: int
) -> Iterator[list[nn.Parameter]]:
    """What a recipe trains: the block's linear weights, or a LoRA that is merged afterwards."""
    if recipe.rank is None:
        with whole(model, coverage, precision) as weights:
            yield weights
        return
    start = slice_factors(coverage, init_factors(coverage.shape, None, recipe.rank, seed), recipe.rank)
    with lora(model, coverage, start, SCALE, precision) as factors:
        yield list(factors.values())
    merge(model, coverage, {key: factor.detach() for key, factor in factors.items()}, SCALE)


def _share_done(recipe: RecoverConfig, steps: int, began: float) -> float:
    """Of the steps or of the minutes, whichever is more."""
    minutes = (time.perf_counter() - began) / 60
    return max(steps / recipe.most_steps, 0.0 if recipe.minutes is None else minutes / recipe.minutes)


def _backward(model: Any, head: Head, teacher: Teacher, batch: Tensor) -> float:
    """Add the gradient of the mean divergence over a batch of windows (n, length), and return that mean."""
    total = 0.0
    for part in torch.split(batch, max(1, AT_ONCE // batch.shape[1])):
        packing = pack([Tokens(tuple(window.tolist()), 1) for window in part], model.device)
        wanted = teacher.states(part, packing)
        loss = divergences(hidden_states(model, packing), head, wanted, teacher.head).sum() / batch.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total
