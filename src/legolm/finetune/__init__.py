"""LoRA on a block and the local training loop."""

from legolm.finetune.lora import lora, merge, merged
from legolm.finetune.train import answer_logits, autocast, fit

__all__ = ["answer_logits", "autocast", "fit", "lora", "merge", "merged"]
