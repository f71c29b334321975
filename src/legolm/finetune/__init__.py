"""LoRA on a block and the local training loop."""

from legolm.finetune.kernels import LoraLinear
from legolm.finetune.lora import lora
from legolm.finetune.masked import MaskedLinear
from legolm.finetune.train import fit
from legolm.finetune.whole import whole

__all__ = ["LoraLinear", "MaskedLinear", "fit", "lora", "whole"]
