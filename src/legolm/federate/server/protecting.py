"""What the LLM takes of the global update, fitted to the sums of the clients' text.

A client trains in a block that lacks units of the LLM; in the LLM others' changes of these units come on top. So of
the update ΔW of a layer that reads units (o_proj, down_proj) the LLM gets the V that gives each client what its slice
gave it:

    argmin over V of Σ_i E_i ‖V x − ΔW (m_i ∘ x)‖² + λ E_public ‖V x‖²  =  ΔW (Σ_i diag(m_i) C_i) (Σ_i C_i + λ P)⁻¹

with m_i the units that client i holds, C_i and P the second moments of what the layer reads on its and on public text:
RegMean (Jin et al., arXiv 2212.09849) of models that hold parts, with its smaller correlations, for a client's text
shows few directions. Public text is of one more who holds nothing, except in the matrices that feed neurons (gate, up):
to keep these off it costs several times as much of what was learned as in all others (docs/aggregation.md). With
ΔW = B A only A changes, so that the rank stays. Nothing is trained, and no client does anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from legolm.adapter import Tensors, parse_key
from legolm.aggregate import Scheme, held_by
from legolm.block import Block, Coverage
from legolm.config import ProtectConfig, RunConfig
from legolm.data import begin, calibration_tokens
from legolm.errors import LegolmError
from legolm.federate.server.members import LLM, Members
from legolm.models import choose_device, choose_precision, load_tokenizer, written
from legolm.prune import Moments, collected, first_readers, load_statistics
from legolm.runs import RunDir, check_sealed, drop_damaged, seal
from legolm.system import Progress, atomic_folder, atomic_write, locked, open_tensors

MATRICES, TOKENS = "matrices.safetensors", "tokens.safetensors"
QUORUMS = (0.0, 0.5, 0.75, 1.0)
"""Shares of the clients that must hold what the LLM takes."""
OFF_DIAGONAL = 0.9
"""What is left of correlations, as in RegMean."""


def fit(
    folder: RunDir,
    config: RunConfig,
    blocks: Mapping[str, Block],
    block_of: Mapping[str, str],
    progress: Progress,
    store: Path | None = None,
) -> None:
    """Write (Σ diag(m) C) (Σ C + λ P)⁻¹ of each tensor that linear layers read, where it is not the identity.

    `block_of` is each client's block. Runs with one `store` have what the LLM writes by itself written once. Raises
    `LegolmError` where the run has no sums of any.
    """
    llm, protect = blocks[LLM], config.federation.protect
    public = _public(protect, llm, config, progress, store) if protect is not None else ()
    shape, held, summed, tokens = llm.coverage.shape, Tensors(), Tensors(), 0
    changed = set[str]()
    for path, coverage in _sums(folder, config, blocks, block_of, progress):
        own = load_statistics([path], shape, llm.base_fingerprint)
        tokens += next(iter(own.sums.values())).tokens
        for name, moments in own.sums.items():
            units, c = _units(coverage, name), _shrunk(moments)
            changed |= set() if bool(units.all()) else {name}
            for sums, part in ((summed, c), (held, c * units[:, None])):
                sums[name] = sums[name].add_(part) if name in sums else part
        del own
    for name, moments, weight in public:
        if "neuron" not in shape.module(name.split(".", 2)[2]).rows:
            summed[name].add_(_shrunk(moments), alpha=weight * tokens / moments.tokens)
            changed.add(name)
    found: Tensors = {}
    with progress.stage("fit what the LLM takes", len(changed)) as advance:
        for name in sorted(changed):
            both = summed.pop(name).double()
            both.diagonal()[both.diagonal() == 0] = 1  # an input that is always zero
            found[name] = torch.linalg.solve(both, held.pop(name).double().T).T.float().contiguous()
            advance(1)
    with atomic_folder(folder.protection) as making:
        atomic_write(making / MATRICES, save(found))
        seal(making)


def _sums(
    folder: RunDir, config: RunConfig, blocks: Mapping[str, Block], block_of: Mapping[str, str], progress: Progress
) -> list[tuple[Path, Coverage]]:
    """Files of clients' sums, each with what of the LLM these clients hold."""
    if not config.federation.regmean:
        return [(folder.sums, blocks[LLM].coverage)]
    names = dict.fromkeys(block_of.values())
    lacking = [name for name in names if not folder.block_sums(name).exists()]
    if len(lacking) == len(names):
        raise LegolmError(f"federation.regmean: no sums in {folder.block_sums(lacking[0]).parent}; give another --out")
    for name in lacking:
        progress.note(f"block {name}: no client with it has sent sums; what the LLM takes is not fitted to their text")
    return [(folder.block_sums(name), blocks[name].coverage) for name in names if name not in lacking]


def _public(
    protect: ProtectConfig, llm: Block, config: RunConfig, progress: Progress, store: Path | None
) -> Iterable[tuple[str, Moments, float]]:
    """The moments of each tensor on the text on which the LLM is to stay what it was, and λ.

    The text is there when this returns, before any sums are in memory; each tensor's moments only when they are asked.
    """
    tokenizer, device = load_tokenizer(llm.path, config.data), choose_device(config.device)
    precision = choose_precision(config.precision, config.device)
    if protect.generated:
        first, shape = begin(tokenizer), (protect.samples, protect.length)
        write = partial(written, llm.path, tokenizer, first, shape, config.seed, precision, device, progress)
        whose = json.dumps([llm.base_fingerprint, first, shape, config.seed, precision, device.type])
        text = write() if store is None else _stored(store, hashlib.sha256(whose.encode()).hexdigest(), write, progress)
    else:
        text = calibration_tokens(protect, tokenizer, config.seed, field="federation.protect")
    found = collected(llm.path, text, "full", precision, progress, device)
    return ((name, moments, protect.weight) for name, moments in found)


def _stored(store: Path, name: str, write: Callable[[], Tensor], progress: Progress) -> Tensor:
    """The tokens that another run wrote with the same model and seed, or that this one writes."""
    place = store / f"text-{name[:12]}"
    with locked(store / ".cut" / place.name, wait=True):  # another run may be writing them
        drop_damaged(place, progress.note)
        if not place.exists():
            with atomic_folder(place) as making:
                atomic_write(making / TOKENS, save({"tokens": write()}))
                seal(making)
    with open_tensors(place / TOKENS, "what the LLM wrote: ", "remove it") as handle:
        found: Tensor = handle.get_tensor("tokens")
        return found


def _units(coverage: Coverage, name: str) -> Tensor:
    """Which numbers of a tensor that is read a block holds, (features,) bool; the hidden state whole."""
    _, number, module = name.split(".", 2)
    layer, shape = int(number), coverage.shape
    count, unit = shape.matrix(module)[1], shape.module(module).cols
    if unit == "hidden":
        return torch.ones(count, dtype=torch.bool)
    if layer not in coverage.layers:
        return torch.zeros(count, dtype=torch.bool)
    kept = coverage.cols(layer, module)
    if kept is None:
        return torch.ones(count, dtype=torch.bool)
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, kept, True)


def _shrunk(moments: Moments) -> Tensor:
    """Σ x xᵀ (features, features), float32, with less off the diagonal."""
    found = moments.sum.cpu()
    return OFF_DIAGONAL * found + (1 - OFF_DIAGONAL) * torch.diag(found.diagonal())


class Known:
    """What the LLM is evaluated and written with after a scheme's rounds."""

    def __init__(self, folder: RunDir, config: RunConfig, members: Members) -> None:
        self._folder, self._config, self._llm = folder, config, members.llm.coverage
        self._first = first_readers(self._llm.shape.modules)
        self._held = [members.trains[id] for id in members.clients]
        some = config.federation.quorum and len({one.hash for one in self._held}) > 1
        self.quorums = QUORUMS if some else QUORUMS[:1]
        """Of which the LLM's validation loss chooses."""
        self._checked = False

    def __call__(self, scheme: Scheme, quorum: float = 0.0) -> Tensors:
        """Of the global update what at least this share of the clients hold; then what `fit` leaves of it."""
        factors = dict(scheme.whole(self._llm, self._config.lora.rank))
        if quorum:
            rank = max(len(tensor) for key, tensor in factors.items() if parse_key(key)[2] == "A")
            shapes = {key: (tensor.shape[0], tensor.shape[1]) for key, tensor in factors.items()}
            for key, held in held_by(shapes, [(coverage, rank) for coverage in self._held]).items():
                factors[key] = factors[key].where(held >= quorum * len(self._held), 0)
        if not self._config.federation.fitted:
            return factors
        if not self._checked:
            check_sealed(self._folder.protection)
            self._checked = True
        read: dict[str, list[str]] = {}
        for key in sorted(factors):
            layer, module, side = parse_key(key)
            if side == "A":
                read.setdefault(f"layers.{layer}.{self._first[module]}", []).append(key)
        with open_tensors(self._folder.protection / MATRICES, "what fits the LLM's update: ", "remove it") as handle:
            for name in sorted(read.keys() & set(handle.keys())):
                matrix = handle.get_tensor(name)
                factors |= {key: factors[key] @ matrix for key in read[name]}
        return factors
