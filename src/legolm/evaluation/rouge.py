"""ROUGE-L of greedy answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from legolm.config import Precision
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.evaluation.figure import Array
from legolm.models import autocast

MAX_NEW_TOKENS = 128
"""An answer that has not ended by then is scored as it is."""


def generate(
    model: Any, examples: Sequence[Tokens], tokenizer: Any, batch_size: int, precision: Precision
) -> list[str]:
    """The model's own greedy answer to each prompt, at most `MAX_NEW_TOKENS` tokens, in the order of `examples`."""
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
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
            )
        for place, ids in zip(places, output[:, padded["input_ids"].shape[1] :], strict=True):
            texts[place] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> Array:
    """F1 of the longest common subsequence of words of each answer and its reference (Lin, 2004): (n,) float64.

    Words are runs of letters and digits of any script, in lower case: on English what `rouge_score` takes them for.
    """
    rouge_scorer = need_rouge()
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return np.array([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs])


def need_rouge() -> Any:
    """The module `rouge_score.rouge_scorer`. Raises `LegolmError` when the extra is not installed."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise LegolmError("--rouge needs rouge_score; run: pip install 'legolm[eval]'") from None
    return rouge_scorer


class _Words:
    """What `rouge_score` calls to split a text."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
