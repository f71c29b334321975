"""LoRA on a block and the local training loop."""

from legolm.finetune.kernels import Joint, LoraLinear
from legolm.finetune.loop import Diverged, fit, learning_rate, planned_steps
from legolm.finetune.lora import lora
from legolm.finetune.masked import MaskedLinear
from legolm.finetune.task import Task, Trainer, train, trainer, trainer_of
from legolm.finetune.whole import whole

__all__ = [
    "Diverged",
    "Joint",
    "LoraLinear",
    "MaskedLinear",
    "Task",
    "Trainer",
    "fit",
    "learning_rate",
    "lora",
    "planned_steps",
    "train",
    "trainer",
    "trainer_of",
    "whole",
]
