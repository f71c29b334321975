"""The local training loop: AdamW on LoRA factors, loss on answer tokens only, examples packed without padding."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from legolm.adapter import Tensors, parse_key
from legolm.block import Coverage
from legolm.config import TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError, PublicError
from legolm.finetune.lora import lora
from legolm.finetune.per_example import Private, apart
from legolm.finetune.task import Task, like_adam, trainer
from legolm.models import Head, answer_losses, hidden_states, lean, pack, shared_prompt
from legolm.system import keep_freed_memory

WINDOW = 8
"""Steps that the first and the last loss are the mean of."""


class Diverged(LegolmError):
    """The loss stopped being finite. `delta` and `metrics` are those of the last step whose loss was finite."""

    def __init__(self, message: str, delta: Tensors, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.delta, self.metrics = delta, metrics


def fit(task: Task, *, by_width: bool = False) -> tuple[Tensors, dict[str, float]]:
    """Train the adapter for at most the task's steps; return (change of each factor that trains, metrics).

    The optimizer is new. The learning rate follows `config.schedule` over `total` steps, or what `epochs` and `tokens`
    leave of them; `by_width` raises it where the block is narrower than the LLM (`widened`). The seed decides the order
    of examples. `proximal` is FedProx's µ (Li et al., arXiv 1812.06127): µ/2 · ‖θ − start‖² is added to the loss.

    Metrics: `loss_first` and `loss_last` (nats per answer token, over up to eight steps), `steps`, `tokens`, `seconds`,
    `truncated` (examples that were cut to length), and `micro_batch_tokens` where memory forced a smaller one.
    With `dp` a step is one of DP-SGD: a Poisson sample of `batch_size` examples on average, the gradient of each one's
    mean loss clipped, noise on their sum; metrics say `sampling_rate` and `noise_multiplier`.
    Raises `LegolmError` when an example has no answer, and `Diverged` when the loss stops being finite.
    """
    model, examples, config = task.model, task.examples, task.config
    for index, example in enumerate(examples):
        if not 0 < example.answer < len(example.ids):
            raise LegolmError(
                f"train: example {index} has no prompt or no answer token; mend it, or raise train.max_length"
            )
    began = time.perf_counter()
    clock = _Clock(task, began)
    losses: list[float] = []
    size = config.micro_batch_tokens
    with (
        keep_freed_memory(),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        lora(model, task.coverage, task.start, task.scale, task.precision, task.frozen, task.dropout) as parameters,
        lean(model, task.precision, config.gradient_checkpointing),
    ):
        torch.manual_seed(task.seed)  # dropout's
        head = Head.of(model, task.precision)
        theta = list(parameters.values())
        received = {key: task.start[key].to(parameter.device) for key, parameter in parameters.items()}
        good = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for key, parameter in parameters.items():
            groups.setdefault(widened(task.coverage, key) if by_width else 1.0, []).append(parameter)
        rated = [{"params": one, "lr": config.learning_rate * factor} for factor, one in groups.items()]
        optimizer = torch.optim.AdamW(rated, weight_decay=0.0, fused=True)
        rate = learning_rate(config, clock.total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(clock.done + step))
        seen: set[int] = set()
        private = (
            None
            if task.dp is None
            else Private.of(task.dp, len(examples), config, task.total or task.steps, task.steps)
        )

        def keep() -> None:
            torch._foreach_copy_(list(good.values()), [parameter.detach() for parameter in theta])

        def result() -> tuple[Tensors, dict[str, float]]:
            window = min(WINDOW, len(losses)) or 1
            metrics = {
                "loss_first": sum(losses[:window]) / window,
                "loss_last": sum(losses[-window:]) / window,
                "steps": float(len(losses)),
                "tokens": float(clock.tokens),
                "seconds": time.perf_counter() - began,
                "truncated": float(sum(examples[i].truncated for i in seen)),
            }
            if private is not None:
                metrics |= {"sampling_rate": private.rate, "noise_multiplier": private.multiplier}
            if size != config.micro_batch_tokens:
                metrics["micro_batch_tokens"] = float(size)
            return {key: (value - received[key]).cpu() for key, value in good.items()}, metrics

        for chosen in _order(len(examples), config.batch_size, task.seed) if private is None else private.batches():
            batch = [examples[i] for i in chosen]
            backward = partial(_backward, model, head, batch)
            if private is not None:
                backward = partial(_backward_apart, model, head, batch, theta, private.clip)
            loss, size = _with_less_memory(backward, size, theta)
            if private is not None:
                private.disturb(theta)
            if task.proximal:
                for key, parameter in parameters.items():
                    parameter.grad.add_(parameter.detach() - received[key], alpha=task.proximal)  # type: ignore[union-attr]
            norm = float(nn.utils.clip_grad_norm_(theta, config.clip_norm))
            if not math.isfinite(loss.mean + norm):
                culprits = ", ".join(str(chosen[place]) for place in loss.not_finite) or "finite, their gradient not"
                raise Diverged(_diverged(task, task.done + len(losses) + 1, culprits), *result())
            keep()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.mean)
            seen.update(chosen)
            if clock.over(sum(len(example.ids) for example in batch)):
                break
        keep()
        return result()


def _diverged(task: Task, step: int, culprits: str) -> str:
    said = f"the loss is not finite at step {step} (examples {culprits})"
    if step == 1:  # no learning rate did that
        return f"train: {said}, before anything was learned; set precision fp32, or take these examples out"
    return f"train.learning_rate {task.config.learning_rate:g}: {said}; lower it"


def moves(coverage: Coverage, key: str, *, by_width: bool = False) -> float:
    """How far a step moves an entry at most, about, in learning rates."""
    return like_adam(coverage, key) * (widened(coverage, key) if by_width else 1.0)


adamw = trainer("adamw", private=True, moves=moves)(fit)


def planned_steps(config: TrainConfig, steps: int, examples: int | None, length: float | None = None) -> int:
    """How many of a training's steps `epochs` leave on so many examples, and `tokens` on such of this mean length.

    The latter about, for batches differ; what `seconds` leave nobody knows before.
    """
    if config.epochs is not None and examples is not None:
        steps = min(steps, math.ceil(config.epochs * examples / config.batch_size))
    if config.tokens is not None and length is not None:
        steps = min(steps, math.ceil(config.tokens / (config.batch_size * length)))
    return steps


def learning_rate(config: TrainConfig, total: float) -> Callable[[float], float]:
    """The factor on the learning rate at a step (from 0) of `total`: a linear warm-up, then the schedule.

    `constant_linear` is constant and falls linearly to zero over the last half; `cosine` falls from the start;
    `constant` does not depend on `total`.
    """

    def factor(step: float) -> float:
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return warm
        left = max(0.0, 1 - step / total)
        return warm * (
            min(1.0, 2 * left) if config.schedule == "constant_linear" else (1 - math.cos(math.pi * left)) / 2
        )

    return factor


def widened(coverage: Coverage, key: str) -> float:
    """The factor on the learning rate of a factor of the MLP: neurons of the LLM for one of the block; 1 elsewhere.

    A step of Adam moves each neuron's part by as much whatever their number is, so that a block of few neurons learns
    slowly at the LLM's rate (Yang et al., "Tensor Programs V", arXiv 2203.03466: rates fall as widths grow).
    """
    module = coverage.shape.module(parse_key(key)[1])
    return coverage.width if "neuron" in (*module.rows, module.cols) else 1.0


@dataclass(frozen=True)
class _Loss:
    """Mean over a batch's answer tokens (nats), and the places in the batch of examples whose loss is not finite."""

    mean: float
    not_finite: tuple[int, ...]


def _backward(model: Any, head: Head, batch: Sequence[Tokens], size: int) -> _Loss:
    """Add the gradient of a batch's mean loss, in micro-batches of at most `size` tokens (or one example)."""
    count = sum(len(example.ids) - example.answer for example in batch)
    total, broken = 0.0, []
    for places in _micro_batches([len(example.ids) for example in batch], size):
        some = [batch[place] for place in places]
        packing = pack(some, model.device, shared_prompt(model, some))
        losses = answer_losses(hidden_states(model, packing)[packing.predict], head, packing.labels)
        (losses.sum() / count).backward()  # type: ignore[no-untyped-call]
        total += float(losses.detach().cpu().double().sum())  # MPS has no float64
        broken += [places[owner] for owner in set(packing.owner[~losses.isfinite()].tolist())]
    return _Loss(total / count, tuple(sorted(broken)))


def _backward_apart(
    model: Any, head: Head, batch: Sequence[Tokens], factors: Sequence[nn.Parameter], bound: float, size: int
) -> _Loss:
    """Add the sum of the gradients of each example's mean loss, each clipped to this L2 norm; parts as above.

    The mean is of finite losses only, 0 without any: whether there is another one is the examples' secret.
    """
    total, count = 0.0, 0
    for places in _micro_batches([len(example.ids) for example in batch], size) if batch else ():
        packing = pack([batch[place] for place in places], model.device)
        with apart(packing.lengths) as parts:
            losses = answer_losses(hidden_states(model, packing)[packing.predict], head, packing.labels)
            (losses / packing.owner.bincount()[packing.owner]).sum().backward()  # type: ignore[no-untyped-call]
        for factor, found in zip(factors, parts.clipped(factors, bound), strict=True):
            factor.grad = found if factor.grad is None else factor.grad.add_(found)
        finite = losses.detach()[losses.isfinite()]
        total, count = total + float(finite.cpu().double().sum()), count + len(finite)
    return _Loss(total / max(count, 1), ())


def _micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of a batch, longest first, in as few parts as `size` tokens allow, about equally large."""
    even = math.ceil(sum(lengths) / math.ceil(sum(lengths) / size))
    found: list[list[int]] = []
    tokens = size
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if tokens >= even or tokens + lengths[place] > size:
            found.append([])
            tokens = 0
        found[-1].append(place)
        tokens += lengths[place]
    return found


def _with_less_memory(
    backward: Callable[[int], _Loss], size: int, parameters: Sequence[nn.Parameter]
) -> tuple[_Loss, int]:
    """Halve the micro-batch for as long as memory runs out; return (loss, the size that worked)."""
    while True:
        try:
            return backward(size), size
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if size <= 1:
                raise PublicError(
                    "train: not even one example fits in memory; lower train.max_length or set "
                    "train.gradient_checkpointing"
                ) from None
        for parameter in parameters:
            parameter.grad = None
        size //= 2
        warnings.warn(f"train: out of memory; going on with micro-batches of {size} tokens", stacklevel=2)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no exception class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class _Clock:
    """When to stop: each part of a task at the first of its steps, epochs, tokens and seconds.

    `done` and `total` are the task's of the steps that limits leave, about: before it and after it these are rounds'.
    """

    def __init__(self, task: Task, began: float) -> None:
        config, count, parts = task.config, len(task.examples), task.parts or (task.steps,)
        length = sum(len(example.ids) for example in task.examples) / count
        share = planned_steps(config, config.steps, count, length) / config.steps
        self.done = task.done * share
        now = sum(planned_steps(config, steps, count, length) for steps in parts)
        after = (task.total or task.steps) - task.done - sum(parts)
        self.total = self.done + now + max(0, after) * share
        self.tokens = 0
        self._config, self._parts = config, [planned_steps(config, steps, count) for steps in parts]
        self._steps, self._most, self._began = 0, config.tokens or math.inf, began

    def over(self, tokens: int) -> bool:
        """After another step of so many tokens."""
        config, now = self._config, time.perf_counter()
        self.tokens += tokens
        self._steps += 1
        late = config.seconds is not None and now - self._began >= config.seconds
        if self._steps < self._parts[0] and self.tokens < self._most and not late:
            return False
        del self._parts[0]
        self._steps, self._most, self._began = 0, self.tokens + (config.tokens or math.inf), now
        return not self._parts


def _order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example indices: whole epochs, each shuffled anew; a batch may span two."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]
