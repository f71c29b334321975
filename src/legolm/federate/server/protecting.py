"""What the LLM learned of the clients, without what it would forget of public text.

Of an update ΔW the change V that is nearest to it on the clients' inputs, and to nothing on public ones:

    argmin over V of E_own ‖(V − ΔW) x‖² + λ E_public ‖V x‖²  =  ΔW C (C + λ P)⁻¹

with C and P the second moments of what the linear layer reads: RegMean (Jin et al., arXiv 2212.09849) of the LLM before
and after, with its smaller correlations, for a client's text shows few directions. With ΔW = B A only A changes, so
that the rank stays. Nothing is trained, and no client does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from legolm.adapter import Tensors, parse_key
from legolm.aggregate import Scheme
from legolm.block import Block
from legolm.config import RunConfig
from legolm.data import calibration_tokens
from legolm.models import choose_device, choose_precision, load_tokenizer
from legolm.prune import Moments, collect, inputs_of, load_statistics
from legolm.runs import RunDir
from legolm.system import Progress, open_tensors

WEIGHT = 0.1
"""λ."""
OFF_DIAGONAL = 0.9
"""What is left of correlations, as in RegMean."""


def protect(folder: RunDir, config: RunConfig, base: Path, fingerprint: str, progress: Progress) -> None:
    """Write C (C + λ P)⁻¹ of every tensor that linear layers read, from the clients' sums and public text."""
    assert config.federation.protect is not None
    tokens = calibration_tokens(config.federation.protect, load_tokenizer(base, config.data), config.seed)
    precision, device = choose_precision(config.precision, config.device), choose_device(config.device)
    public = collect(base, fingerprint, tokens, "full", precision, progress, device)
    own = load_statistics([folder.sums], public.shape, fingerprint)
    found: Tensors = {}
    with progress.stage("protect public text", len(own.sums)) as advance:
        for name, moments in own.sums.items():
            c, p = (_shrunk(one) for one in (moments, public.sums[name]))
            both = c + WEIGHT * p
            both.diagonal()[both.diagonal() == 0] = 1  # an input that is always zero
            found[name] = torch.linalg.solve(both, c).T.float().contiguous()
            advance(1)
    partial = folder.protection.with_suffix(".partial")
    save_file(found, partial)
    partial.replace(folder.protection)


def _shrunk(moments: Moments) -> Tensor:
    """E[x xᵀ], float64, with less off the diagonal."""
    found = moments.sum.double().cpu() / moments.tokens
    return OFF_DIAGONAL * found + (1 - OFF_DIAGONAL) * torch.diag(found.diagonal())


def known_of(folder: RunDir, config: RunConfig, llm: Block) -> Callable[[Scheme], Tensors]:
    """What the LLM is evaluated and written with after a scheme's rounds."""
    rank = config.lora.rank
    if config.federation.protect is None:
        return lambda scheme: scheme.whole(llm.coverage, rank)
    first = {name: group[0] for group in inputs_of(llm.coverage.shape.modules) for name in group}

    def protected(scheme: Scheme) -> Tensors:
        factors = dict(scheme.whole(llm.coverage, rank))
        with open_tensors(folder.protection, "federation.protect: ", "run again in another folder") as handle:
            for key, tensor in factors.items():
                layer, module, side = parse_key(key)
                if side == "A":
                    factors[key] = tensor @ handle.get_tensor(f"layers.{layer}.{first[module]}")
        return factors

    return protected
