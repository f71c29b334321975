"""How fast a model answers on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from legolm.config import Precision
from legolm.models import autocast, continued

PROMPT, TOKENS, TURNS = 8, 16, 3


def tokens_per_second(model: Any, precision: Precision) -> float:
    """Tokens a second of one greedy answer (batch 1): the fastest of `TURNS`, since other work only takes away."""
    ids = torch.ones(1, PROMPT, dtype=torch.int64, device=model.device)
    seconds = []
    for _ in range(TURNS + 1):  # the first warms up
        began = time.perf_counter()
        with autocast(precision, model.device.type):
            continued(model, ids, TOKENS).tolist()  # a GPU has finished when its tokens are here
        seconds.append(time.perf_counter() - began)
    return TOKENS / min(seconds[1:])
