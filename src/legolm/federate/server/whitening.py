"""Frozen factors that see text evenly.

Beside a frozen A (r, d) a client learns from A x alone. A hidden state x is large in a few directions for every token
(massive activations: Sun et al., arXiv 2402.17762), so that random rows see these and little of what tells one token
from another. Here

    A = c R (C + ε I)^(-1/4)

with R random orthonormal rows, C the mean of x xᵀ over text, ε a hundredth of C's mean eigenvalue, and c such that
E ‖A x‖² is what R has: half of the way, in the logarithm of each eigenvalue, to inputs that vary by the same in all
directions. Text is the clients' own, by the sums by which blocks are cut, or public. Clients hold no LLM to make C of:
each has its A with its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from legolm.adapter import Tensors, is_whitened, parse_key, save_frozen, slice_factors
from legolm.aggregate import make_scheme
from legolm.block import Block, read_block
from legolm.config import CLIENTS, RunConfig, TextConfig
from legolm.data import calibration_tokens
from legolm.federate.server.begin import frozen_factors, start_factors
from legolm.models import choose_device, choose_precision, load_tokenizer
from legolm.prune import Moments, collected, first_readers, load_statistics
from legolm.runs import RunDir
from legolm.system import Progress, atomic_write

POWER = 0.25
FLOOR = 0.01
"""ε, of the mean eigenvalue: what the text shows no variance in is not to count for more than all the rest."""


def whitening_text(text: str) -> TextConfig:
    """How much of it is read: some tokens for each direction of a small model's hidden state."""
    return TextConfig(text=text, samples=32, length=128)


def whiten(folder: RunDir, config: RunConfig, llm: Block, progress: Progress) -> None:
    """Write the frozen factors of this run that read the hidden state, float32, in the LLM's coordinates.

    Raises `LegolmError` for text that is missing or too short.
    """
    shape, text = llm.coverage.shape, make_scheme(config.aggregate).whitened
    assert text is not None
    first = first_readers(shape.modules)
    reads: dict[str, list[str]] = {}
    random = {key: tensor for key, tensor in start_factors(config, llm).items() if is_whitened(key, shape)}
    for key in random:
        layer, module, _ = parse_key(key)
        reads.setdefault(f"layers.{layer}.{first[module]}", []).append(key)
    found: Tensors = {}
    for name, moments in _sums(folder, config, llm, text, progress):
        if name not in reads:
            continue
        mean, root = _root(moments)
        for key in reads[name]:
            rows = random[key].double()
            seen = rows @ root
            size = ((rows @ mean) * rows).sum() / ((seen @ mean) * seen).sum()
            found[key] = (size.sqrt() * seen).float().contiguous()
    atomic_write(folder.frozen, save(found))


def place_frozen(folder: RunDir, block: Path) -> None:
    """Put a block's slice of what `whiten` wrote, if anything, into its folder."""
    if folder.frozen.exists():
        factors = frozen_factors(folder)
        rank = max(map(len, factors.values()), default=0)
        save_frozen(slice_factors(read_block(block).coverage, factors, rank), block)


def _sums(
    folder: RunDir, config: RunConfig, llm: Block, text: str, progress: Progress
) -> Iterator[tuple[str, Moments]]:
    """Second moments of what the LLM's linear layers read, by name."""
    if text == CLIENTS:
        sums = load_statistics([folder.sums], llm.coverage.shape, llm.base_fingerprint).sums
        with progress.stage("whiten the frozen factors", len(sums)) as advance:
            for named in sums.items():
                yield named
                advance(1)
        return
    tokenizer, precision = load_tokenizer(llm.path, config.data), choose_precision(config.precision, config.device)
    tokens = calibration_tokens(whitening_text(text), tokenizer, config.seed, field="aggregate.whiten")
    yield from collected(llm.path, tokens, "full", precision, progress, choose_device(config.device))


def _root(moments: Moments) -> tuple[Tensor, Tensor]:
    """C and (C + ε I)^(-1/4), both (features, features) float64."""
    mean = moments.sum.cpu().double() / moments.tokens
    values, vectors = torch.linalg.eigh(mean)
    values = values.clamp(min=0) + FLOOR * values.clamp(min=0).mean()
    return mean, vectors * values**-POWER @ vectors.T
