"""Sums of products: the truncation is the best there is, stacked or dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.aggregate.lowrank import ProductSum, frobenius


@given(
    rows=st.integers(2, 30), cols=st.integers(2, 30), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    rank=st.integers(1, 5), dense=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_best_is_the_best(rows: int, cols: int, ranks: list[int], rank: int, dense: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, whole = ProductSum(rows, cols), torch.zeros(rows, cols, dtype=torch.float64)
    for k in ranks:
        left, right = torch.randn(rows, k, generator=generator), torch.randn(k, cols, generator=generator)
        total.add(left, right)
        whole += left.double() @ right.double()
    if dense:
        total.make_dense()
    u, s, v = total.best(rank)
    expected = torch.linalg.svd(whole, full_matrices=False)
    best = float(expected.S[rank:].norm())
    error = float((whole - (u * s) @ v).norm())
    assert error <= best * (1 + 1e-5) + 1e-6 * float(whole.norm())


def test_scaling_rows_and_columns() -> None:
    for dense in (False, True):
        total = ProductSum(2, 2)
        total.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
        if dense:
            total.make_dense()
        total.scale(rows=torch.tensor([1.0, 10.0]).double())
        total.scale(cols=torch.tensor([1.0, 0.5]).double())
        assert total.make_dense().tolist() == [[3.0, 2.0], [60.0, 40.0]]


def test_past_the_crossover_the_sum_is_dense() -> None:
    total = ProductSum(4, 4)
    for count, stacked in ((1, 1), (2, 2), (3, 0)):  # 4 · 4 / (4 + 4) = 2
        total.add(torch.ones(4, 1), torch.ones(1, 4))
        assert total.rank == stacked
        assert float(total.best(1)[1][0]) == pytest.approx(4.0 * count)


def test_nothing_has_no_directions() -> None:
    for total in (ProductSum(3, 2), ProductSum(3, 2)):
        total.add(torch.zeros(3, 1), torch.ones(1, 2))
        u, s, v = total.best(2)
        assert (u.shape, s.shape, v.shape) == ((3, 0), (0,), (0, 2))


def test_frobenius() -> None:
    left, right = torch.randn(5, 2), torch.randn(2, 7)
    assert frobenius(left, right) == pytest.approx(float((left @ right).norm()), rel=1e-5)
