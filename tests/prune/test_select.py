"""Choosing units and fitting the rest, against least squares written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from legolm.prune.moments import Regression
from legolm.prune.select import LEAST_RIDGE, RIDGE, eliminate, refit


def problem(features: int, outputs: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Regression]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    weight = torch.randn(outputs, features, generator=generator)
    wanted = inputs @ weight.T + torch.randn(tokens, outputs, generator=generator)
    fit = Regression(torch.nn.Linear(features, outputs))
    for part in range(0, tokens, 70):
        fit.add(inputs[part : part + 70], wanted[part : part + 70])
    return inputs, wanted, weight, fit


def ridge_of(inputs: Tensor) -> float:
    """The more, the fewer tokens an input was seen with."""
    tokens, features = inputs.shape
    return max(LEAST_RIDGE, RIDGE * features / tokens) * float(inputs.double().square().sum(0).mean())


def least_loss(inputs: Tensor, wanted: Tensor, weight: Tensor, kept: list[int]) -> float:
    """min over V of ‖Y − X V‖² + ridge ‖V − W‖², where columns that are not kept have V = 0."""
    x, y, w = inputs.double(), wanted.double(), weight.double()
    ridge = ridge_of(x)
    stacked = torch.cat([x[:, kept], ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    goal = torch.cat([y, ridge**0.5 * w[:, kept].T])
    fitted = torch.linalg.lstsq(stacked, goal).solution
    gone = [j for j in range(w.shape[1]) if j not in kept]
    return float((stacked @ fitted - goal).square().sum() + ridge * w[:, gone].square().sum())


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3]))
@settings(max_examples=25)
def test_the_errors_on_the_way_are_those_of_least_squares(seed: int, width: int) -> None:
    inputs, wanted, weight, fit = problem(12, 5, 210, seed)
    found = eliminate(fit, weight, width, 2)
    kept = [unit * width + i for unit in found.kept for i in range(width)]
    whole = least_loss(inputs, wanted, weight, list(range(12)))
    # The ridge pulls dropped columns to nothing instead of to the dense weights, a constant that the path leaves out.
    ridge = ridge_of(inputs)
    gone = [j for j in range(12) if j not in kept]
    constant = ridge * float(weight[:, gone].double().square().sum())
    assert found.errors[-1][0] == 2
    loss = least_loss(inputs, wanted, weight, kept) - whole - constant
    assert found.errors[-1][1] + 0 == pytest.approx(loss + constant, rel=0.02, abs=1e-2 * whole)
    shares = [error for _, error in found.errors]
    assert shares == sorted(shares)


def test_one_at_a_time_it_drops_what_costs_least() -> None:
    inputs, wanted, weight, fit = problem(8, 4, 200, 1)
    kept = eliminate(fit, weight, 1, 7).kept
    losses = {j: least_loss(inputs, wanted, weight, [i for i in range(8) if i != j]) for j in range(8)}
    ridge = ridge_of(inputs)
    costs = {j: loss - ridge * float(weight[:, j].square().sum()) for j, loss in losses.items()}
    assert set(range(8)) - set(kept) == {min(costs, key=costs.__getitem__)}


def test_of_two_equal_neurons_one_goes_first_and_the_other_takes_over() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, generator=generator)
    inputs[:, 5] = inputs[:, 2]
    weight = 3 * torch.randn(4, 6, generator=generator)  # large: by energy, other units would go first
    weight[:, 0] *= 0.1
    fit = Regression(torch.nn.Linear(6, 4))
    fit.add(inputs, inputs @ weight.T)
    found = eliminate(fit, weight, 1, 5)
    assert len({2, 5} - set(found.kept)) == 1
    cols = torch.tensor(found.kept)
    torch.testing.assert_close(inputs[:, cols] @ refit(fit, weight, cols).T, inputs @ weight.T, rtol=0.02, atol=0.05)


def test_where_text_is_short_the_fit_stays_nearer_to_the_weights_and_answers_new_text_better() -> None:
    better = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(40, 40, generator=generator)
        weight = torch.randn(6, 40, generator=generator)
        seen, new = (torch.randn(count, 40, generator=generator) @ mix for count in (60, 2000))
        noise = 10 * torch.randn(60, 6, generator=generator)
        fit = Regression(torch.nn.Linear(40, 6))
        fit.add(seen, seen @ weight.T + noise)
        kept = torch.arange(30)
        x, y = seen[:, kept].double(), (seen @ weight.T + noise).double()
        small = LEAST_RIDGE * float(seen.double().square().sum(0).mean())
        plain = torch.linalg.solve(x.T @ x + small * torch.eye(30), x.T @ y + small * weight[:, kept].T.double())
        errors = [
            float((new[:, kept].double() @ one - new.double() @ weight.T.double()).square().mean())
            for one in (refit(fit, weight, kept).T.double(), plain)
        ]
        better.append(errors[0] < errors[1])
    assert sum(better) >= 7
