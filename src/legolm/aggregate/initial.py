"""The adapter that a run starts from, made from a seed on the server or on a client alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from legolm.coverage import init_factors, modules_of, parse_key
from legolm.models.family import Shape
from legolm.types import Tensors


def initial_factors(
    shape: Shape,
    targets: Iterable[str] | None,
    rank: int,
    seed: int,
    frozen_side: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> Tensors:
    """A and B of every module in the LLM's coordinates, float32; the product BA is zero.

    `ranks` are those of single modules, named by their last part.
    `frozen_side`: the factor that never trains is random orthonormal (rows of A, columns of B), the other one zero.
    """
    if not frozen_side:
        return init_factors(shape, targets, rank, seed, ranks)
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    for layer in range(shape.layers):
        for module in modules_of(shape, targets):
            rows, cols = shape.matrix(module)
            own = (ranks or {}).get(module.rpartition(".")[2], rank)
            side = frozen_side_of(shape, module)
            size, other = (cols, rows) if side == "A" else (rows, cols)
            basis = torch.linalg.qr(torch.randn(size, own, generator=generator))[0]
            zero = torch.zeros(own, other) if side == "B" else torch.zeros(other, own)
            a, b = (basis.T.contiguous(), zero) if side == "A" else (zero, basis)
            factors |= {f"layers.{layer}.{module}.A": a, f"layers.{layer}.{module}.B": b}
    return factors


def frozen_side_of(shape: Shape, module: str) -> str:
    """The factor on the side that no block ever cuts: A where rows are cut, B where columns are."""
    return "A" if shape.module(module).cols == "hidden" else "B"


def is_frozen(key: str, shape: Shape) -> bool:
    """Whether a factor stays as it started in the frozen-side form."""
    _, module, side = parse_key(key)
    return side == frozen_side_of(shape, module)
