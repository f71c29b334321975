"""The keys of an adapter's factors, and their shapes in a block's slice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.models import Shape

Tensors = dict[str, Tensor]
"""Adapter factors keyed `layers.{LLM layer}.{module}.{A|B}`: A is (rank, in), B is (out, rank), float32."""


def factor_key(layer: int, module: str, side: str) -> str:
    """`layers.{LLM layer}.{module}.{A|B}`."""
    return f"layers.{layer}.{module}.{side}"


@lru_cache(maxsize=1 << 14)  # a model has some hundreds, asked for with every factor
def parse_key(key: str) -> tuple[int, str, str]:
    """(LLM layer, module, side) of a factor key. Raises `LegolmError` when it is not one."""
    head, _, rest = key.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, side = rest.rpartition(".")
    number = layer.isascii() and layer.isdecimal() and len(layer) < 10
    if head != "layers" or not number or not module or side not in ("A", "B"):
        raise LegolmError(f"adapter: {key!r} is not a key of the form layers.N.module.A or .B")
    return int(layer), module, side


def modules_of(shape: Shape, targets: Iterable[str] | None, field: str = "lora.targets") -> list[str]:
    """Modules named by their last part (None: all), in the family's order. Raises `LegolmError` for others.

    As in PEFT a name means all that end in it: GPT-2's `c_proj` is in attention and in the MLP.
    """
    known = dict.fromkeys(module.rpartition(".")[2] for module in shape.modules)
    wanted = list(known if targets is None else targets)
    for name in wanted:
        if name not in known:
            raise LegolmError(
                f"{field}: {name!r} is not a linear layer of family {shape.family!r}; known: {', '.join(known)}"
            )
    return [module for module in shape.modules if module.rpartition(".")[2] in wanted]


def factor_shape(coverage: Coverage, key: str, rank: int) -> tuple[int, int]:
    """Shape of a factor in the block's slice."""
    layer, module, side = parse_key(key)
    rows, cols = coverage.matrix(layer, module)
    return (rank, cols) if side == "A" else (rows, rank)


def adapter_keys(coverage: Coverage, targets: Iterable[str] | None, trained: bool = False) -> list[str]:
    """Keys of a block's factors; `trained`: without those of the side that stays in the frozen-side form."""
    shape = coverage.shape
    modules = modules_of(shape, targets)
    keys = (factor_key(layer, module, side) for layer in coverage.layers for module in modules for side in "AB")
    return [key for key in keys if not (trained and is_frozen(key, shape))]


def check_factors(where: str, factors: Tensors, coverage: Coverage) -> None:
    """Raise `LegolmError` unless every layer has both factors of every module, finite and in the block's shape."""
    if not factors:
        raise LegolmError(f"{where}: its adapter is empty")
    wanted = set(adapter_keys(coverage, sorted({parse_key(key)[1].rpartition(".")[2] for key in factors})))
    for key in sorted(wanted | set(factors)):
        tensor = factors.get(key)
        if tensor is None or key not in wanted:
            lost = "missing; an adapter must be on the same modules in every layer of its block"
            raise LegolmError(f"{where}: {key} is {lost if tensor is None else 'not the block’s'}")
        # A and B of a module have one rank, A's.
        rank = len(factors.get(f"{key[:-1]}A", tensor))
        if tuple(tensor.shape) != factor_shape(coverage, key, rank):
            raise LegolmError(f"{where}: {key} has shape {tuple(tensor.shape)}, which does not fit the block")
        if not bool(tensor.isfinite().all()):
            raise LegolmError(f"{where}: {key} is not finite")


def frozen_side_of(shape: Shape, module: str) -> str:
    """The factor on the side that no block ever cuts: A where rows are cut, B where columns are."""
    return "A" if shape.module(module).cols == "hidden" else "B"


def is_frozen(key: str, shape: Shape) -> bool:
    """Whether a factor stays as it started in the frozen-side form."""
    _, module, side = parse_key(key)
    return side == frozen_side_of(shape, module)


def is_whitened(key: str, shape: Shape) -> bool:
    """Whether a factor is a frozen one that reads the hidden state, and so may be made of what it reads."""
    return key.endswith(".A") and is_frozen(key, shape)


def adapter_parameters(coverage: Coverage, targets: list[str] | None, rank: int) -> int:
    """Entries of A and B over all modules that a block holds."""
    modules = modules_of(coverage.shape, targets)
    return rank * sum(sum(coverage.matrix(layer, module)) for layer in coverage.layers for module in modules)


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """For `state()`: the same tensors under `prefix.`."""
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def under_prefix(prefix: str, state: Tensors) -> Tensors:
    """The tensors that `with_prefix` put under `prefix.`."""
    start = f"{prefix}."
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
