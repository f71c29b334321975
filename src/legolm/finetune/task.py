"""What a client's training is given, and how a trainer registers itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from legolm.adapter import Tensors
from legolm.block import Coverage
from legolm.config import TRAINERS, Entry, Precision, TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError


@dataclass(frozen=True)
class Task:
    """One training of one block: its model, the adapter `start` (float32, by key) with its scale, and the examples.

    Factors in `frozen` do not train. At most `steps` steps are made, of `total` in the whole run (these, if not given)
    of which the client made `done` before. `proximal` is FedProx's µ, `dropout` that of LoRA.
    """

    model: Any
    coverage: Coverage
    start: Tensors
    scale: float
    examples: Sequence[Tokens]
    config: TrainConfig
    precision: Precision
    steps: int
    seed: int
    done: int = 0
    total: int | None = None
    frozen: Collection[str] = ()
    proximal: float = 0.0
    dropout: float = 0.0


Fitted = tuple[Tensors, dict[str, float]]
"""The change of each factor that trains, and metrics: `loss_first`, `loss_last`, `steps`, `tokens`, `seconds`, more."""
Train = Callable[[Task], Fitted]


def trainer(name: str) -> Callable[[Callable[..., Fitted]], Entry[Train]]:
    """Register a trainer under the name that configs use: `f(task, *, own settings)`; the model is left as it was.

    Raises `LegolmError` for a name that is taken and for another signature.
    """

    def register(function: Callable[..., Fitted]) -> Entry[Train]:
        def make(**settings: Any) -> Train:
            return partial(function, **settings)

        return TRAINERS.register(name, function, make, ("task",))

    return register


def train(task: Task) -> Fitted:
    """Train with the task's configured trainer. Raises `LegolmError` for an answer that is no change of the factors."""
    name = task.config.trainer
    delta, metrics = TRAINERS.entry(name).make(**task.config.settings)(task)
    wanted = {key: tensor.shape for key, tensor in task.start.items() if key not in task.frozen}
    if {key: tensor.shape for key, tensor in delta.items()} != wanted:
        raise LegolmError(f"trainer {name!r}: gave a change of other factors than those that train, or other shapes")
    return {key: tensor.float() for key, tensor in delta.items()}, metrics
