"""A model's own greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from legolm.config import Precision
from legolm.data import Tokens
from legolm.models import autocast


def generate(
    model: Any,
    examples: Sequence[Tokens],
    tokenizer: Any,
    batch_size: int,
    precision: Precision,
    most: int,
    cut: str = "",
) -> list[str]:
    """The answer to each prompt, at most `most` tokens; one that had not ended has `cut` after it."""
    # An answer ends where the chat template ends it (the last token of a true answer) or with the end of text.
    ends = {item.ids[-1] for item in examples} & set(tokenizer.all_special_ids) | {tokenizer.eos_token_id}
    order = sorted(range(len(examples)), key=lambda place: examples[place].answer, reverse=True)
    texts = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        prompts = [list(examples[place].ids[: examples[place].answer]) for place in places]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad(), autocast(precision, model.device.type):
            output = model.generate(
                **padded,
                max_new_tokens=most,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
            )
        for place, ids in zip(places, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            texts[place] = tokenizer.decode(ids, skip_special_tokens=True)
            if not ends & set(ids):
                texts[place] += cut
    return texts
