"""Sketches of second moments: what they hold, and what is put in the place of what they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from legolm.prune import Moments
from legolm.prune.sketch import restore, sketch


def moments(x: Tensor) -> Moments:
    found = Moments(x.shape[1], "full")
    found.add(x)
    return found


def again(x: Tensor, columns: int, seed: int = 0) -> Tensor:
    return restore(*sketch(moments(x), columns, seed), len(x), seed).sum


def test_one_column_holds_what_moves_together() -> None:
    """Inputs that are multiples of (1, -2, 0, 4): Σx xᵀ is (1 + 4 + 9) times its outer product with itself."""
    x = torch.tensor([[1.0], [2.0], [-3.0]]) * torch.tensor([1.0, -2.0, 0.0, 4.0])
    wanted = 14 * torch.outer(torch.tensor([1.0, -2, 0, 4]), torch.tensor([1.0, -2, 0, 4]))
    torch.testing.assert_close(again(x, 1), wanted, rtol=0.02, atol=1e-6)


def test_what_moves_alone_stays_alone() -> None:
    """Independent inputs of sizes 1, 10, 100, 0: a sketch of one column keeps the squares."""
    found = again(torch.diag(torch.tensor([1.0, 10, 100, 0])), 1)
    torch.testing.assert_close(found.diagonal(), torch.tensor([1.0, 100, 10_000, 0]), rtol=1e-5, atol=0)
    assert (found[3] == 0).all()


@settings(max_examples=30)
@given(
    features=st.integers(1, 24), columns=st.integers(1, 24), tokens=st.integers(1, 40), seed=st.integers(0, 2**40),
)  # fmt: skip
def test_restored_moments_are_moments(features: int, columns: int, tokens: int, seed: int) -> None:
    """Positive semidefinite, the squares exact whatever the sketch lacks; with all columns it lacks bfloat16's bits."""
    columns = min(columns, features)
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=drawn) * torch.randn(features, generator=drawn).exp()
    whole, found = moments(x), restore(*sketch(moments(x), columns, seed), tokens, seed)
    assert found.tokens == tokens
    torch.testing.assert_close(found.sum.diagonal(), whole.sum.diagonal(), rtol=1e-5, atol=1e-6)
    size = whole.sum.diagonal().sqrt()
    correlations = found.sum / size / size[:, None]
    assert float(torch.linalg.eigvalsh(correlations.double()).min()) > -1e-4
    if columns == features:
        torch.testing.assert_close(correlations, whole.sum / size / size[:, None], rtol=0, atol=0.1)


def test_clients_sketches_hold_more_than_one_of_their_sum() -> None:
    """Eight clients with four directions each in 32 inputs: six columns hold four directions, and not 32."""
    drawn = torch.Generator().manual_seed(0)
    each = [torch.randn(200, 4, generator=drawn) @ torch.randn(4, 32, generator=drawn) for _ in range(8)]
    whole = moments(torch.cat(each)).sum
    apart = torch.stack([again(x, 6, seed) for seed, x in enumerate(each)]).sum(0)
    assert (apart - whole).norm() < 0.01 * whole.norm()
    assert (again(torch.cat(each), 6) - whole).norm() > 0.4 * whole.norm()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_sketch_is_refused(wrong: float) -> None:
    squares, product = sketch(moments(torch.eye(3)), 2, 0)
    with pytest.raises(ValueError, match="a sketch that is not finite"):
        restore(squares, product.fill_(wrong), 3, 0)
    with pytest.raises(ValueError, match="a sum of squares is -"):
        restore(-squares, sketch(moments(torch.eye(3)), 2, 0)[1], 3, 0)
