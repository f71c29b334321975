"""LoRA on a block and the local training loop."""

from legolm.finetune.kernels import LoraLinear
from legolm.finetune.loop import Diverged, fit, learning_rate
from legolm.finetune.lora import lora
from legolm.finetune.masked import MaskedLinear
from legolm.finetune.task import Task, train, trainer
from legolm.finetune.whole import whole

__all__ = [
    "Diverged",
    "LoraLinear",
    "MaskedLinear",
    "Task",
    "fit",
    "learning_rate",
    "lora",
    "train",
    "trainer",
    "whole",
]
