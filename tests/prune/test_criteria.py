"""Unstructured criteria against references written from the papers in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from legolm.config import CRITERIA
from legolm.errors import LegolmError
from legolm.prune import Pattern
from legolm.prune.moments import Moments
from legolm.prune.registry import keep_largest


def cut(name: str, **settings: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return CRITERIA.entry(name).make(**settings).prune


def layer(rows: int = 12, cols: int = 20, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(cols, cols, generator=generator)
    return torch.randn(rows, cols, generator=generator), torch.randn(tokens, cols, generator=generator) @ mix


def moments_of(inputs: Tensor, needs: str) -> Moments:
    moments = Moments(inputs.shape[-1], needs)  # type: ignore[arg-type]
    for part in inputs.split(150):
        moments.add(part[None])
    return moments


def test_moments_add_up() -> None:
    _, inputs = layer()
    torch.testing.assert_close(moments_of(inputs, "full").sum, inputs.T @ inputs, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments_of(inputs, "diagonal").mean_square, inputs.square().mean(0))
    torch.testing.assert_close(moments_of(inputs, "full").mean_square, inputs.square().mean(0))


def test_moments_stay_exact_under_autocast() -> None:
    _, inputs = layer()
    moments = Moments(inputs.shape[-1], "full")
    with torch.autocast("cpu", torch.bfloat16):
        moments.add(inputs)
    torch.testing.assert_close(moments.sum, inputs.T @ inputs, rtol=1e-5, atol=1e-3)


@given(st.integers(1, 40), st.floats(0, 0.99))
def test_exactly_the_share_is_dropped_even_when_all_are_equal(size: int, sparsity: float) -> None:
    assert int((~keep_largest(torch.ones(3, size), sparsity)).sum()) == 3 * round(sparsity * size)


def test_magnitude_by_hand() -> None:
    weight, mask = cut("magnitude")(torch.tensor([[1.0, -5.0], [0.5, 2.0]]), None, Pattern(0.5))
    assert weight.tolist() == [[0.0, -5.0], [0.0, 2.0]]
    assert mask.tolist() == [[False, True], [False, True]]


def test_wanda_agrees_with_float64() -> None:
    weight, inputs = layer()
    found, mask = cut("wanda")(weight, moments_of(inputs, "diagonal"), Pattern(0.4))
    scores = weight.double().abs() * inputs.double().norm(dim=0)
    for row in range(len(weight)):
        order = sorted(range(weight.shape[1]), key=lambda j: float(scores[row, j]))
        assert (~mask[row]).nonzero().flatten().tolist() == sorted(order[:8])
    assert torch.equal(found, weight * mask)


def reference_sparsegpt(weight: Tensor, inputs: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon column by column, with the inverse recomputed for the columns that are left."""
    w = weight.double().clone()
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += 0.03 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    count = w.shape[1]
    # Mask of the (single) block of columns, from the diagonal of each remaining inverse.
    diagonal = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(count)])
    scores = (w.square() / diagonal).flatten()
    mask = torch.ones(w.numel(), dtype=torch.bool)
    mask[scores.argsort(stable=True)[: round(sparsity * w.numel())]] = False
    mask = mask.view_as(w)
    for j in range(count):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = w[:, j] * ~mask[:, j] / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w * mask, mask


def test_sparsegpt_agrees_with_float64() -> None:
    weight, inputs = layer()
    found, mask = cut("sparsegpt", refit=0)(weight, moments_of(inputs, "full"), Pattern(0.5))
    expected, expected_mask = reference_sparsegpt(weight, inputs, 0.5)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert bool((found[~mask] == 0).all())


def test_refitted_weights_are_the_least_squares_of_each_row() -> None:
    """Against each row's normal equations in float64; the mask is SparseGPT's, and the outputs are nearer."""
    weight, inputs = layer()
    before, mask = cut("sparsegpt", refit=0)(weight, moments_of(inputs, "full"), Pattern(0.5))
    found, same = cut("sparsegpt", refit=200)(weight, moments_of(inputs, "full"), Pattern(0.5))
    assert torch.equal(mask, same)
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += 0.03 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for row, kept, dense in zip(found, mask, weight.double(), strict=True):
        exact = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ dense)
        torch.testing.assert_close(row[kept].double(), exact, rtol=1e-3, atol=1e-4)
        assert bool((row[~kept] == 0).all())

    def error(pruned: Tensor) -> Tensor:
        change = (pruned - weight).double()
        return (change @ hessian * change).sum(1)

    assert bool((error(found) <= error(before) * (1 + 1e-6)).all()) and error(found).sum() < 0.9 * error(before).sum()
    few, _ = cut("sparsegpt")(weight, moments_of(inputs, "full"), Pattern(0.5))
    assert bool((error(few) <= error(before) * (1 + 1e-6)).all())


def test_sparsegpt_over_several_blocks_beats_wanda_on_the_outputs() -> None:
    weight, inputs = layer(rows=16, cols=300, tokens=1200)
    dense = inputs @ weight.T
    errors = {}
    for name, (pruned, mask) in {
        "sparsegpt": cut("sparsegpt")(weight, moments_of(inputs, "full"), Pattern(0.5)),
        "wanda": cut("wanda")(weight, moments_of(inputs, "diagonal"), Pattern(0.5)),
    }.items():
        assert abs(float((~mask).float().mean()) - 0.5) < 0.01
        errors[name] = float((inputs @ pruned.T - dense).square().mean())
    assert errors["sparsegpt"] < 0.7 * errors["wanda"]


def test_sparsegpt_prunes_dead_columns_and_refuses_infinite_moments() -> None:
    weight, inputs = layer()
    inputs[:, 4] = 0
    found, _ = cut("sparsegpt")(weight, moments_of(inputs, "full"), Pattern(0.3))
    assert bool((found[:, 4] == 0).all())
    broken = moments_of(inputs, "full")
    broken.add(torch.full((1, 20), float("inf")))
    with pytest.raises(LegolmError, match=r"calibration\.samples"):
        cut("sparsegpt")(weight, broken, Pattern(0.3))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_n_of_m_in_every_group(criterion: str, kept: int, group: int) -> None:
    weight, inputs = layer(rows=6, cols=16)
    found, mask = cut(criterion)(weight, moments_of(inputs, "full"), Pattern(1 - kept / group, group))
    assert bool((mask.unflatten(1, (-1, group)).sum(-1) == kept).all())
    assert bool((found[~mask] == 0).all())


def test_two_of_four_wanda_by_hand() -> None:
    moments = Moments(4, "diagonal")
    moments.add(torch.tensor([[1.0, 10.0, 1.0, 1.0]]))
    _, mask = cut("wanda")(torch.tensor([[5.0, 1.0, 3.0, -4.0]]), moments, Pattern(0.5, 4))
    assert mask.tolist() == [[True, True, False, False]]
