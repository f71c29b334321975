"""What a client's training is given, and how a trainer registers itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from legolm.adapter import Tensors
from legolm.block import Coverage
from legolm.config import TRAINERS, DpConfig, Entry, Precision, TrainConfig, guarded
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.runs import Training


@dataclass(frozen=True)
class Task:
    """One training of one block: its model, the adapter `start` (float32, by key) with its scale, and the examples.

    Factors in `frozen` do not train. At most `steps` steps are made, of `total` in the whole run (these, if not given)
    of which the client made `done` before. Where they stand for several trainings, `parts` are the steps of each, and
    what else limits a training (`config`) counts in each anew. `proximal` is FedProx's µ, `dropout` that of LoRA. With
    `dp` steps are those of DP-SGD.
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
    dp: DpConfig | None = None
    parts: Sequence[int] = ()


Fitted = tuple[Tensors, dict[str, float]]
"""The change of each factor that trains, and metrics: `loss_first`, `loss_last`, `steps`, `tokens`, `seconds`, more."""
Moves = Callable[..., float]
"""How far a step moves an entry of a factor at most, about, in learning rates: `f(coverage, key, *, own settings)`."""


@dataclass(frozen=True)
class Trainer:
    """A trainer with its settings.

    `private`: with a task's `dp` its steps are DP-SGD's. `moves` says what room secure sums of its changes need.
    """

    fit: Callable[[Task], Fitted]
    private: bool
    moves: Callable[[Coverage, str], float]


def like_adam(_coverage: Coverage, _key: str, **_settings: Any) -> float:
    """Of AdamW about 1, and more while gradients grow."""
    return 2.0


def trainer(
    name: str, *, private: bool = False, moves: Moves | None = None
) -> Callable[[Callable[..., Fitted]], Entry[Trainer]]:
    """Register a trainer under the name that configs use: `f(task, *, own settings)`; the model is left as it was.

    `private` and `moves` are as in `Trainer`; one that says nothing of how far it moves moves as AdamW does.
    Raises `LegolmError` for a name that is taken and for another signature.
    """

    def register(function: Callable[..., Fitted]) -> Entry[Trainer]:
        def make(**settings: Any) -> Trainer:
            where = f"trainer {name!r}"
            return Trainer(
                partial(guarded(where, function), **settings), private, partial(moves or like_adam, **settings)
            )

        return TRAINERS.register(name, function, make, ("task",))

    return register


def trainer_of(config: TrainConfig) -> Trainer:
    """The configured trainer."""
    found: Trainer = TRAINERS.entry(config.trainer).make(**config.settings)
    return found


def train(task: Task) -> Fitted:
    """Train with the task's configured trainer. Raises `LegolmError` for an answer that is no change of the factors."""
    where = f"trainer {task.config.trainer!r}"
    answer: Any = trainer_of(task.config).fit(task)
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(part, Mapping) for part in answer)):
        raise LegolmError(f"{where}: gave {_said(answer)}; it must give (changes by factor, metrics by name)")
    delta, metrics = answer
    wanted = {key: tuple(tensor.shape) for key, tensor in task.start.items() if key not in task.frozen}
    for key in sorted({*delta, *wanted}, key=str):
        found = tuple(delta[key].shape) if isinstance(delta.get(key), Tensor) else _said(delta.get(key))
        if found != wanted.get(key):
            raise LegolmError(
                f"{where}: gave {found} for {key}, which is {wanted.get(key, 'none that trains')}; it must give the "
                "change of each factor of task.start that is not in task.frozen"
            )
    needed = {name: None for name, one in Training.model_fields.items() if one.is_required()}
    if task.dp is not None:  # what it costs is accounted by these
        needed |= dict.fromkeys(("sampling_rate", "noise_multiplier"))
    for name, value in (needed | dict(metrics)).items():
        if not isinstance(value, int | float):
            raise LegolmError(f"{where}: gave {_said(value)} for metric {name}; it must give a number")
    return {key: tensor.float() for key, tensor in delta.items()}, dict(metrics)


def _said(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
