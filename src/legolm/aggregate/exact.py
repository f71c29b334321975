"""The exact form of HeteAgg: products are aggregated, not factors (docs/aggregation.md).

    Δ_k = B_k A_k − (the product of what client k received)
    S ← S + η Σ_k n_k C_k ∘ Δ_k / D ,    broadcast G = T_r(S)

per module, without the scale s, which all share. D is Σ n_k c_k (`coverage_mean`) or Σ n_k (`global_fill`). A block's
structure cuts rows or columns, never both, so that D scales rows of the left or columns of the right stack and S is
never dense. A bit mask (unstructured blocks, which train with the masked forward) makes its module dense. S is kept to
rank `residual_rank`, so that what G lacks is fed back next round (`residual: feedback`), is merged into what blocks are
evaluated and written with at the end besides (`fold`), or is dropped (`drop`). The LLM is evaluated and written with S.

What nobody covers in a round does not move in it, in S or in the first r directions of G, for any r. A truncation of
the whole matrix would move it, as its directions turn with what was learned elsewhere. So in S only the rows that are
covered are truncated (or columns; below, rows), and the others keep what they have: the rank of S can pass
`residual_rank` where rounds cover different rows. G has one A for all rows, so that directions of which uncovered rows
have something, p of them, stay as they are. Of the covered rows' product X it gets the best that such an A allows
(Golub, Hoffman and Stewart, 1987): X P + T_{r−p}(X − X P), P the projection on those directions. It costs what X has
beside them and beyond r − p more: blocks lack that, while S has it, until a round covers all that G has learned. Where
every round covers the same rows, the rest is zero, p is 0, and nothing is lost. A bit mask leaves out single entries,
which no product of low rank can keep: there only rows without any covered entry stay.

Memory: for each module the stacked factors of all clients of the round, r (m + n) numbers each, at most the dense
(m, n) matrix in float64; twice that where there is a bit mask. Needs the clients' products: no secure sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, parse_key, slice_factors, under_prefix, with_prefix
from legolm.aggregate.factors import Denominator
from legolm.aggregate.interface import Scheme, Start, factors_in
from legolm.aggregate.lowrank import ProductSum, best_beside, product_slice, svd_of_product
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

    streams = basis_stays = False

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

    def held_rank(self, ranks: Sequence[int], rank: int, rounds: int) -> int:
        """S, where rounds cover the same."""
        return rank if self._residual == "drop" else max(rank, self._residual_rank)

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the first `rank` directions of G."""
        return slice_factors(coverage, self._factors, rank)

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """The slice of G; with `residual: fold` of S, of its whole rank."""
        return self.whole(coverage, rank) if self._residual == "fold" else self.payload(coverage, rank)

    def whole(self, coverage: Coverage, rank: int) -> Tensors:
        """The slice of S, of its whole rank."""
        return product_slice(coverage, self._product, self._factors) or self.payload(coverage, rank)

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
        if self._rows_are_cut(name):
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
        elif self._rows_are_cut(name):
            module.products.add(change, common)
        else:
            module.products.add(common.T, change.T)

    def _flush(self, module: _Module, name: str) -> None:
        if module.common is not None and module.beside is not None:
            if self._rows_are_cut(name):
                module.products.add(module.beside, module.common)
            else:
                module.products.add(module.common.T, module.beside.T)
            module.common = module.beside = None

    def _structural_weight(self, name: str) -> Tensor:
        """Dense D (m, n) of the clients so far."""
        layer, kind, _ = parse_key(f"{name}.A")
        held = self._round.units(layer, kind)[:, 0]
        shape = self._start.shape.matrix(kind)
        return (held[:, None] if self._rows_are_cut(name) else held[None, :]).expand(shape).clone()

    def _step(self, name: str, module: _Module) -> ProductSum:
        """η N / D of one module."""
        layer, kind, _ = parse_key(f"{name}.A")
        self._flush(module, name)
        products, eta = module.products, self._start.server.eta
        mean = self._denominator == "coverage_mean"
        if module.weight is not None:
            dense = products.make_dense()
            d = module.weight if mean else torch.full_like(dense, self._examples)
            dense.mul_(torch.where(module.weight > 0, eta / d, 0.0))
        else:
            held = self._round.units(layer, kind)[:, 0]
            factor = torch.where(held > 0, eta / (held if mean else self._examples), 0.0)
            products.scale(**{"rows" if self._rows_are_cut(name) else "cols": factor})
        return products

    def _covered(self, name: str, module: _Module) -> Tensor:
        """1 for each row (or column, where those are cut) of which somebody holds something, else 0, to scale it."""
        layer, kind, _ = parse_key(f"{name}.A")
        rows = self._rows_are_cut(name)
        if module.weight is not None:
            return (module.weight > 0).any(1, keepdim=True).double() if rows else (module.weight > 0).any(0).double()
        held = (self._round.units(layer, kind)[:, 0] > 0).double()
        return held[:, None] if rows else held

    def _rows_are_cut(self, name: str) -> bool:
        return self._start.shape.module(parse_key(f"{name}.A")[1]).cols == "hidden"

    def _finish_module(self, name: str, module: _Module) -> None:
        products, covered, rows = self._step(name, module), self._covered(name, module), self._rows_are_cut(name)
        kept = None  # what S has where nobody covers
        if f"{name}.A" in self._product:
            a, b = (self._product[f"{name}.{side}"].double() for side in "AB")
            here, kept = _scaled(a, b, covered, rows), _scaled(a, b, 1 - covered, rows)
            products.add(here[1], here[0])
        drop, rank = self._residual == "drop", self._start.rank
        u, s, v = products.best(rank if drop else max(rank, self._residual_rank))
        v, u = _scaled(v, u, covered, rows)  # rounding is no change either
        self._broadcast(name, u, s, v, covered)
        if drop:
            self._product |= {f"{name}.{side}": self._factors[f"{name}.{side}"] for side in "AB"}
            return
        if kept is not None and bool(kept[0].any()) and bool(kept[1].any()):
            left, right = torch.cat([u * s, kept[1]], 1), torch.cat([v, kept[0]])
            u, s, v = svd_of_product(left, right, min(products.rows, products.cols))
        self._product |= {f"{name}.A": v.float(), f"{name}.B": (u * s).float()}

    def _broadcast(self, name: str, u: Tensor, s: Tensor, v: Tensor, covered: Tensor) -> None:
        """G of one module from the covered part of S, U σ V: directions that reach beyond it stay, others are new.

        Rows of A keep the norm that they started with: the balanced split √σ shrinks A and slows learning. Directions
        that σ leaves empty get the start's row of A and zeros in B, else they would never learn again.
        """
        if self._begun is None:
            self._begun = self._start.make()
        start_a, start_b = self._begun[f"{name}.A"], self._begun[f"{name}.B"]
        a, b, rows = start_a.clone(), torch.zeros_like(start_b), self._rows_are_cut(name)
        old_a, old_b = (self._factors[f"{name}.{side}"].double() for side in "AB")
        kept = _scaled(old_a, old_b, 1 - covered, rows)
        stays = kept[0].any(1) & kept[1].any(0)
        if bool(stays.any()):
            free = len(stays) - int(stays.sum())
            if rows:
                more, u, s, v = best_beside(u * s, v, old_a[stays], free)
                a[stays], b[:, stays] = old_a[stays].float(), (kept[1][:, stays] + more).float()
            else:
                more, right, s, left = best_beside(v.T, (u * s).T, old_b[:, stays].T, free)
                v, u = right.T, left.T
                a[stays], b[:, stays] = (kept[0][stays] + more.T).float(), old_b[:, stays].float()
            v, u = _scaled(v, u, covered, rows)
        norm = start_a.double().norm(dim=1).mean()
        fresh = (~stays).nonzero().flatten()[: len(s)]
        a[fresh], b[:, fresh] = (v * norm)[: len(fresh)].float(), (u * s / norm)[:, : len(fresh)].float()
        self._factors[f"{name}.A"], self._factors[f"{name}.B"] = a, b


def _scaled(a: Tensor, b: Tensor, scale: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """A and B, the rows of their product multiplied by `scale` (m, 1), or its columns by `scale` (n,)."""
    return (a, b * scale) if rows else (a * scale, b)


def _place(value: Tensor, index: Tensor | None, size: int, dim: int) -> Tensor:
    if index is None:
        return value
    shape = list(value.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=value.dtype).index_copy_(dim, index, value)
