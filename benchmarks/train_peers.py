"""Training by legolm and by TRL or Hugging Face's Trainer under one clock, for `train_speed.py` and `gpu.py`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

from legolm.data import Tokens
from legolm.finetune import Task, fit
from legolm.models import pack

Began = Callable[[int, int], None]
"""Called when a step begins, with its tokens (padding not counted) and those of them that are learned."""


def ours(task: Task, began: Began, read: Callable[[int], None] = lambda _tokens: None) -> dict[str, float]:
    """Metrics of a `fit` of the task. `read` is called with the tokens that the model reads of what `began` named."""
    import legolm.finetune.loop as loop

    backward = loop._backward

    def counted(model: Any, head: Any, batch: Sequence[Tokens], size: int) -> Any:
        began(sum(len(row.ids) for row in batch), sum(len(row.ids) - row.answer for row in batch))
        return backward(model, head, batch, size)

    def packed(*args: Any) -> Any:
        packing = pack(*args)
        read(packing.ids.numel())
        return packing

    with patch.object(loop, "_backward", counted), patch.object(loop, "pack", packed):
        return fit(task)[1]


def theirs(
    kind: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    began: Began,
    rank: int,
    settings: dict[str, Any],
    seconds: float = math.inf,
) -> list[float]:
    """The losses that `kind` ("trl" or "hf") logged: LoRA on all linear layers, the rows in their order, nothing saved.

    `settings` are fields of `SFTConfig` or `TrainingArguments`. No step begins later than `seconds` after the first.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    data = Dataset.from_dict(
        {
            "input_ids": [list(row.ids) for row in rows],
            "labels": [[-100] * row.answer + list(row.ids[row.answer :]) for row in rows],
        }
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    settings = {
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }

    begun: list[float] = []

    def counted(base: Any) -> Any:
        class Counted(base):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
                mask = inputs.get("attention_mask")
                tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
                began(int(tokens), int((inputs["labels"] != -100).sum()))
                begun.append(time.perf_counter())
                self.control.should_training_stop |= begun[-1] - begun[0] >= seconds
                return super().training_step(model, inputs, *args)

        return Counted

    with tempfile.TemporaryDirectory() as folder:
        if kind == "trl":
            from trl import SFTConfig, SFTTrainer

            trainer = counted(SFTTrainer)(
                model=model,
                args=SFTConfig(folder, **settings),
                train_dataset=data,
                peft_config=lora,
                processing_class=tokenizer,
            )
        else:
            trainer = counted(Trainer)(
                model=get_peft_model(model, lora),
                args=TrainingArguments(folder, **settings),
                train_dataset=data,
                data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            )
        trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]
