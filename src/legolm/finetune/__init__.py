"""LoRA on a block and the local training loop."""

from legolm.finetune.adapters import load_adapter, load_factors, read_adapter, save_adapter, save_factors
from legolm.finetune.lean import hidden_states, lean
from legolm.finetune.lora import lora, merge, merged
from legolm.finetune.loss import Head, divergences, judged
from legolm.finetune.packing import pack
from legolm.finetune.precision import autocast, choose_device, choose_precision, dtype_of
from legolm.finetune.train import Diverged, fit
from legolm.finetune.whole import whole

__all__ = [
    "Diverged",
    "Head",
    "autocast",
    "choose_device",
    "choose_precision",
    "divergences",
    "dtype_of",
    "fit",
    "hidden_states",
    "judged",
    "lean",
    "load_adapter",
    "load_factors",
    "lora",
    "merge",
    "merged",
    "pack",
    "read_adapter",
    "save_adapter",
    "save_factors",
    "whole",
]
