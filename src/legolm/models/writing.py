"""Text that a model writes by itself, where nobody has any that is like what it knows.

As Liu et al. make data for quantization ("LLM-QAT", arXiv 2305.17888): a token drawn from all, then what the model goes
on with. That such text is as good as real one for pruning found Williams et al. ("Self-calibration for Language Model
Quantization and Pruning", arXiv 2410.17170).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from legolm.config import Precision
from legolm.data import special_ids
from legolm.models.continuing import continued
from legolm.models.load import load_model
from legolm.models.precision import autocast, dtype_of
from legolm.system import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32
"""Samples that are written side by side: what each has read stands in memory."""


def written(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    first: list[int],
    shape: tuple[int, int],
    seed: int,
    precision: Precision,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Token ids of this shape (samples, length), int64, each row `first` and two plain tokens or more.

    The first of them is drawn from all alike, the others as the model in `path` gives them, without any cut or
    temperature. The same again for the same `seed` on one machine.
    """
    samples, length = shape
    model = load_model(path, dtype_of(precision)).to(device)
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    special = special_ids(tokenizer)
    plain = torch.tensor([id for id in range(known) if id not in special])
    more = length - len(first) - 1
    how: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0}  # no row is padded, but asked for
    how["suppress_tokens"] = [*sorted(special), *range(known, model.config.vocab_size)]
    cards = [device] if device.type == "cuda" else []
    rows: list[Tensor] = []
    with torch.random.fork_rng(cards), progress.stage("write text", samples) as advance:
        torch.manual_seed(seed)
        for count in (min(AT_ONCE, samples - done) for done in range(0, samples, AT_ONCE)):
            drawn = plain[torch.randint(len(plain), (count, 1))]
            begun = torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, -1), drawn], 1).to(device)
            with autocast(precision, device.type):
                rows.append(continued(model, begun, more, **how).cpu())
            advance(count)
    return torch.cat(rows)
