"""Weights rounded to bfloat16: the change survives in the mean, what is on the grid stays."""

import pytest
import torch

from legolm.models import rounded


def test_a_quarter_of_the_last_place_is_rounded_up_in_a_quarter_of_the_cases() -> None:
    values = torch.full((40_000,), 1 + 2**-9)  # bfloat16 has 1 and 1 + 2⁻⁷
    found = rounded(values, torch.bfloat16, 0).float()
    assert found.unique().tolist() == [1, 1 + 2**-7]
    assert float((found > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(rounded(-values, torch.bfloat16, 0).float(), -found)
    assert values.bfloat16().unique().tolist() == [1]  # rounding to the nearest loses it all


def test_what_is_on_the_grid_stays_and_the_seed_decides_the_rest() -> None:
    grid = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    grid = grid.bfloat16().float()
    assert torch.equal(rounded(grid, torch.bfloat16, 3).float(), grid)
    values = torch.randn(1000)
    one, same, other = (rounded(values, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(rounded(values, torch.float32, 0), values)


def test_a_large_matrix_is_rounded_in_no_pattern() -> None:
    """A column's weights change alike: rounded by the same numbers they would all be rounded up, or none."""
    quarter = torch.full((300, 256), 1 + 2**-9)
    up = (rounded(quarter, torch.bfloat16, 0).float() > 1).float()
    assert len(up.unique(dim=0)) == len(up)
    assert float(up.mean()) == pytest.approx(0.25, abs=0.01)
    for along in (0, 1):
        assert float(up.mean(along).std()) == pytest.approx((0.25 * 0.75 / up.shape[along]) ** 0.5, rel=0.2)
    assert torch.equal(rounded(quarter.t(), torch.bfloat16, 0).float() > 1, up.view(256, 300) > 0)
    assert rounded(torch.empty(0, 3), torch.bfloat16, 0).shape == (0, 3)
