"""What the LLM takes of the global update: what enough clients hold, and what public text hardly sees.

The second: of an update ΔW the change V that is nearest to it on the clients' inputs, and to nothing on public ones:

    argmin over V of E_own ‖(V − ΔW) x‖² + λ E_public ‖V x‖²  =  ΔW C (C + λ P)⁻¹

with C and P the second moments of what the linear layer reads: RegMean (Jin et al., arXiv 2212.09849) of the LLM before
and after, with its smaller correlations, for a client's text shows few directions. With ΔW = B A only A changes, so
that the rank stays. Nothing is trained, and no client does anything.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from legolm.adapter import Tensors, parse_key
from legolm.aggregate import Scheme, held_by
from legolm.config import RunConfig
from legolm.data import calibration_tokens
from legolm.federate.server.members import Members
from legolm.models import choose_device, choose_precision, load_config, load_tokenizer, shape_of
from legolm.prune import Moments, collected, inputs_of, load_statistics
from legolm.runs import RunDir, check_sealed, seal
from legolm.system import Progress, atomic_folder, atomic_write, open_tensors

WEIGHT = 0.1
"""λ."""
MATRICES = "matrices.safetensors"
QUORUMS = (0.0, 0.5, 0.75, 1.0)
"""Shares of the clients that must hold what the LLM takes."""
OFF_DIAGONAL = 0.9
"""What is left of correlations, as in RegMean."""


def protect(folder: RunDir, config: RunConfig, base: Path, fingerprint: str, progress: Progress) -> None:
    """Write C (C + λ P)⁻¹ of every tensor that linear layers read, from the clients' sums and public text."""
    assert config.federation.protect is not None
    tokenizer = load_tokenizer(base, config.data)
    tokens = calibration_tokens(config.federation.protect, tokenizer, config.seed, field="federation.protect")
    precision, device = choose_precision(config.precision, config.device), choose_device(config.device)
    own = load_statistics([folder.sums], shape_of(load_config(base)), fingerprint)
    found: Tensors = {}
    for name, public in collected(base, tokens, "full", precision, progress, device):
        c, p = _shrunk(own.sums[name]), _shrunk(public)
        both = c + WEIGHT * p
        both.diagonal()[both.diagonal() == 0] = 1  # an input that is always zero
        found[name] = torch.linalg.solve(both, c).T.float().contiguous()
    with atomic_folder(folder.protection) as partial:
        atomic_write(partial / MATRICES, save(found))
        seal(partial)


def _shrunk(moments: Moments) -> Tensor:
    """E[x xᵀ], float64, with less off the diagonal."""
    found = moments.sum.cpu().double() / moments.tokens  # not every device has float64
    return OFF_DIAGONAL * found + (1 - OFF_DIAGONAL) * torch.diag(found.diagonal())


class Known:
    """What the LLM is evaluated and written with after a scheme's rounds."""

    def __init__(self, folder: RunDir, config: RunConfig, members: Members) -> None:
        self._folder, self._config, self._llm = folder, config, members.llm.coverage
        self._first = {name: group[0] for group in inputs_of(self._llm.shape.modules) for name in group}
        self._held = [members.trains[id] for id in members.clients]
        some = config.federation.quorum and len({one.hash for one in self._held}) > 1
        self.quorums = QUORUMS if some else QUORUMS[:1]
        """Of which the LLM's validation loss chooses."""
        self._checked = False

    def __call__(self, scheme: Scheme, quorum: float = 0.0) -> Tensors:
        """Of the global update what at least this share of the clients hold; then what `protect` leaves of it."""
        factors = dict(scheme.whole(self._llm, self._config.lora.rank))
        if quorum:
            rank = max(len(tensor) for key, tensor in factors.items() if parse_key(key)[2] == "A")
            shapes = {key: (tensor.shape[0], tensor.shape[1]) for key, tensor in factors.items()}
            for key, held in held_by(shapes, [(coverage, rank) for coverage in self._held]).items():
                factors[key] = factors[key].where(held >= quorum * len(self._held), 0)
        if self._config.federation.protect is None:
            return factors
        if not self._checked:
            check_sealed(self._folder.protection)
            self._checked = True
        read, matrix = "", torch.zeros(0)
        for key in sorted(key for key in factors if parse_key(key)[2] == "A"):
            layer, module, _ = parse_key(key)
            if (name := f"layers.{layer}.{self._first[module]}") != read:
                with open_tensors(self._folder.protection / MATRICES, "federation.protect: ", "remove it") as handle:
                    read, matrix = name, handle.get_tensor(name)
            factors[key] = factors[key] @ matrix
        return factors
