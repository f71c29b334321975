"""ROUGE-L of greedy answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from legolm.errors import LegolmError
from legolm.evaluation.figure import Array


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
