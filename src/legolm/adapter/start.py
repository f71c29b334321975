"""The adapter that a run starts from, made from a seed on the server or on a client alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch

from legolm.adapter.keys import Tensors, factor_key, frozen_side_of, modules_of
from legolm.models import Shape


def initial_factors(
    shape: Shape,
    targets: Iterable[str] | None,
    rank: int,
    seed: int,
    frozen_side: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> Tensors:
    """A and B of every module in the LLM's coordinates, float32; the product BA is zero. Not to be written to.

    `ranks` are those of single modules, named by their last part.
    `frozen_side`: the factor that never trains is random orthonormal (rows of A, columns of B), the other one zero.
    """
    named = None if targets is None else tuple(targets)
    return dict(_made(shape, named, rank, seed, frozen_side, tuple(sorted((ranks or {}).items()))))


@lru_cache(maxsize=2)
def _made(
    shape: Shape,
    targets: tuple[str, ...] | None,
    rank: int,
    seed: int,
    frozen_side: bool,
    pairs: tuple[tuple[str, int], ...],
) -> Tensors:
    """Kept: a QR for each module takes time, and both ends ask for each block and round."""
    ranks = dict(pairs)
    if not frozen_side:
        return init_factors(shape, targets, rank, seed, ranks)
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    for layer in range(shape.layers):
        for module in modules_of(shape, targets):
            rows, cols = shape.matrix(module)
            own = ranks.get(module.rpartition(".")[2], rank)
            side = frozen_side_of(shape, module)
            size, other = (cols, rows) if side == "A" else (rows, cols)
            basis = torch.linalg.qr(torch.randn(size, own, generator=generator))[0]
            zero = torch.zeros(own, other) if side == "B" else torch.zeros(other, own)
            a, b = (basis.T.contiguous(), zero) if side == "A" else (zero, basis)
            factors |= {f"layers.{layer}.{module}.A": a, f"layers.{layer}.{module}.B": b}
    return factors


def init_factors(
    shape: Shape, targets: Iterable[str] | None, rank: int, seed: int, ranks: Mapping[str, int] | None = None
) -> Tensors:
    """The server's start, shared by all clients: A uniform in ±1/sqrt(in) (as PEFT's LoRA), B zero; float32.

    `ranks` are those of single modules, named by their last part.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    modules = modules_of(shape, targets)
    modules_of(shape, ranks or {}, "lora.ranks")
    for layer in range(shape.layers):
        for module in modules:
            rows, cols = shape.matrix(module)
            own = (ranks or {}).get(module.rpartition(".")[2], rank)
            uniform = torch.rand(own, cols, generator=generator)
            factors[factor_key(layer, module, "A")] = (2 * uniform - 1) / math.sqrt(cols)
            factors[factor_key(layer, module, "B")] = torch.zeros(rows, own)
    return factors
