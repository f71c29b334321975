"""The exact form of HeteAgg: products are aggregated, not factors (docs/aggregation.md).

    Δ_k = B_k A_k − (the product of what client k received)
    S ← S + η Σ_k n_k C_k ∘ Δ_k / D ,    broadcast G = T_r(S)

per module, without the scale s, which all share. D is Σ n_k c_k (`coverage_mean`) or Σ n_k (`global_fill`). A block's
structure cuts rows or columns, never both, so that D scales rows of the left or columns of the right stack and S is
never dense. A bit mask (unstructured blocks, which train with the masked forward) makes its module dense. S is kept to
rank `residual_rank`, so that what G lacks is fed back next round (`residual: feedback`), is merged into what is
evaluated and written at the end besides (`fold`), or is dropped (`drop`).

Memory: for each module the stacked factors of all clients of the round, r (m + n) numbers each, at most the dense
(m, n) matrix in float64; twice that where there is a bit mask. Needs the clients' products: no secure sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, parse_key, slice_factors, under_prefix, with_prefix
from legolm.aggregate.factors import Denominator
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.aggregate.lowrank import ProductSum
from legolm.aggregate.weight import EntryWeight, Placement
from legolm.block import Coverage, add_matrix

Residual = Literal["feedback", "fold", "drop"]
RESIDUAL_RANK = 32
"""Of the product that the server keeps, by default."""


class _Module:
    """One module's sums in a round."""

    def __init__(self, rows: int, cols: int) -> None:
        self.products = ProductSum(rows, cols)
        self.weight: Tensor | None = None  # dense D, once there is a bit mask
        self.common: Tensor | None = None  # the broadcast factor of the side that is never cut
        self.beside: Tensor | None = None  # Σ n Δ of the other factor: it multiplies `common`


class ExactForm(Scheme):
    """S per module as float32 factors of rank `residual_rank`, and the broadcast adapter G of the run's rank."""

    streams = False

    def __init__(
        self, denominator: Denominator, residual: Residual = "feedback", residual_rank: int = RESIDUAL_RANK
    ) -> None:
        self._denominator, self._residual, self._residual_rank = denominator, residual, residual_rank

    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""
        self._start = start
        self._factors = start.make() if state is None else factors_in(state)
        names = sorted({key.rpartition(".")[0] for key in self._factors})
        # A warm start's product is where S starts; the usual start's is zero.
        self._product: Tensors = (
            under_prefix("product", state)
            if state is not None
            else {
                f"{name}.{side}": self._factors[f"{name}.{side}"].clone()
                for name in names
                for side in "AB"
                if bool(self._factors[f"{name}.B"].any())
            }
        )
        # The usual start's factors are made anew for empty directions (`split`): the same for the same seed.
        self._begun = dict(self._factors) if state is None else None
        self._reset()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the first `rank` directions of G."""
        return slice_factors(coverage, self._factors, rank)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """The slice of G; with `residual: fold` of S, of its whole rank."""
        if self._residual != "fold" or not self._product:
            return self.payload(coverage, rank)
        width = max(tensor.shape[1] for key, tensor in self._product.items() if key.endswith(".B"))
        whole = {}
        for key, factor in self._factors.items():
            rows, cols = factor.shape
            padded = torch.zeros((width, cols) if key.endswith(".A") else (rows, width))
            found = self._product.get(key)
            if found is not None:
                padded[: found.shape[0], : found.shape[1]] = found
            whole[key] = padded
        return slice_factors(coverage, whole, width)

    def add(self, change: Change, coverage: Coverage) -> None:
        """Stack n (B_k ΔA + ΔB P_A), which is n Δ_k, at the rows and columns that the block holds."""
        n = float(change.examples)
        held = {key.rpartition(".")[0] for key in change.delta}
        for name in sorted(held):
            self._add_module(name, change, coverage, n)
        self._round.add(coverage, change.rank, n)
        self._examples += n

    def change(self, name: str) -> Tensor:
        """η N / D of a module, dense (m, n), float64, not truncated; `finish` cannot come after it."""
        return self._step(name, self._modules[name]).make_dense()

    def finish(self) -> None:
        """S + η N / D, truncated; G from its first directions."""
        for name, module in self._modules.items():
            self._finish_module(name, module)
        self._reset()

    def state(self) -> Tensors:
        """G by factor key, S under `product.`."""
        return self._factors | with_prefix("product", self._product)

    def _reset(self) -> None:
        self._modules: dict[str, _Module] = {}
        self._round = EntryWeight(self._start.shape, self._start.rank)
        self._examples = 0.0

    def _add_module(self, name: str, change: Change, coverage: Coverage, n: float) -> None:
        layer, kind, _ = parse_key(f"{name}.A")
        rows, cols = self._start.shape.matrix(kind)
        module = self._modules.setdefault(name, _Module(rows, cols))
        da, db = (change.delta[f"{name}.{side}"].double() for side in "AB")
        pa, pb = (change.received[f"{name}.{side}"].double() for side in "AB")
        mask = coverage.mask(layer, kind)
        if mask is not None and module.weight is None:
            module.weight = self._structural_weight(name)
            self._flush(module, name)
            module.products.make_dense()
        if module.weight is not None:
            product = (pb + db) @ da + db @ pa
            here = torch.ones_like(product) if mask is None else mask.double()
            add_matrix(coverage, layer, kind, module.products.make_dense(), n * here * product)
            add_matrix(coverage, layer, kind, module.weight, n * here)
            return
        placement = Placement.of(coverage)
        a_rows, b_rows = placement.index(f"{name}.A"), placement.index(f"{name}.B")
        # One of the two products has the broadcast's uncut factor in it, which is everyone's: its other factor sums.
        if self._start.shape.module(kind).cols == "hidden":
            module.products.add(_place(n * (pb + db), b_rows, rows, 0), da)
            common, beside = pa, _place(n * db, b_rows, rows, 0)
        else:
            module.products.add(n * db, _place(pa + da, a_rows, cols, 1))
            common, beside = pb.T, _place(n * da, a_rows, cols, 1).T
        self._add_common(module, name, common, beside)

    def _add_common(self, module: _Module, name: str, common: Tensor, change: Tensor) -> None:
        """beside += change, where `common` (r, whole side) starts as the others' does; else as one more product."""
        rank = common.shape[0]
        if module.common is None:
            full = self._start.rank
            module.common = torch.zeros(full, common.shape[1], dtype=torch.float64)
            module.beside = torch.zeros(change.shape[0], full, dtype=torch.float64)
        assert module.beside is not None
        unset = not bool(module.beside[:, :rank].any())
        if unset:
            module.common[:rank] = common
        if torch.equal(module.common[:rank], common):
            module.beside[:, :rank] += change
        elif self._start.shape.module(parse_key(f"{name}.A")[1]).cols == "hidden":
            module.products.add(change, common)
        else:
            module.products.add(common.T, change.T)

    def _flush(self, module: _Module, name: str) -> None:
        if module.common is not None and module.beside is not None:
            if self._start.shape.module(parse_key(f"{name}.A")[1]).cols == "hidden":
                module.products.add(module.beside, module.common)
            else:
                module.products.add(module.common.T, module.beside.T)
            module.common = module.beside = None

    def _structural_weight(self, name: str) -> Tensor:
        """Dense D (m, n) of the clients so far."""
        layer, kind, _ = parse_key(f"{name}.A")
        held = self._round.units(layer, kind)[:, 0]
        along_rows = self._start.shape.module(kind).cols == "hidden"
        shape = self._start.shape.matrix(kind)
        return (held[:, None] if along_rows else held[None, :]).expand(shape).clone()

    def _step(self, name: str, module: _Module) -> ProductSum:
        """η N / D of one module."""
        layer, kind, _ = parse_key(f"{name}.A")
        self._flush(module, name)
        products, eta = module.products, self._start.server.server_learning_rate
        mean = self._denominator == "coverage_mean"
        if module.weight is not None:
            dense = products.make_dense()
            d = module.weight if mean else torch.full_like(dense, self._examples)
            dense.mul_(torch.where(module.weight > 0, eta / d, 0.0))
        else:
            held = self._round.units(layer, kind)[:, 0]
            factor = torch.where(held > 0, eta / (held if mean else self._examples), 0.0)
            products.scale(**{"rows" if self._start.shape.module(kind).cols == "hidden" else "cols": factor})
        return products

    def _finish_module(self, name: str, module: _Module) -> None:
        products = self._step(name, module)
        if f"{name}.A" in self._product:
            products.add(self._product[f"{name}.B"], self._product[f"{name}.A"])
        rank = self._start.rank
        u, s, v = products.best(rank if self._residual == "drop" else max(rank, self._residual_rank))
        self._product |= {f"{name}.A": v.float(), f"{name}.B": (u * s).float()}
        if self._begun is None:
            self._begun = self._start.make()
        start = self._begun[f"{name}.A"], self._begun[f"{name}.B"]
        self._factors[f"{name}.A"], self._factors[f"{name}.B"] = split(u[:, :rank], s[:rank], v[:rank], *start)


def split(u: Tensor, s: Tensor, v: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors A and B (float32, shapes of the start's) of U σ V.

    Rows of A keep the norm that they started with: the balanced split √σ shrinks A and slows learning. Directions
    that σ leaves empty get the start's row of A and zeros in B, else they would never learn again.
    """
    norm = start_a.double().norm(dim=1).mean()
    a, b = start_a.clone(), torch.zeros_like(start_b)
    a[: len(s)] = (v * norm).float()
    b[:, : len(s)] = (u * s / norm).float()
    return a, b


def _place(value: Tensor, index: Tensor | None, size: int, dim: int) -> Tensor:
    if index is None:
        return value
    shape = list(value.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=value.dtype).index_copy_(dim, index, value)
