"""What noise costs: against published values, and a budget that is not passed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.config import DpConfig
from legolm.errors import LegolmError
from legolm.privacy import Budget, gaussian_epsilon, noise_to_signal, sampled_epsilon, sampled_noise, within


def delta_of(epsilon: float, multiplier: float) -> float:
    """Of the Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return phi(a - b) - math.exp(epsilon) * phi(-a - b)


@pytest.mark.parametrize(("multipliers", "alone"), [([1.0], 1.0), ([2.0] * 4, 1.0), ([3.0, 1.5, 2.0], None)])
def test_gaussians_one_after_the_other_are_one(multipliers: list[float], alone: float | None) -> None:
    alone = alone or 1 / math.sqrt(sum(z**-2 for z in multipliers))
    found = gaussian_epsilon(multipliers, 1e-5)
    assert delta_of(found, alone) == pytest.approx(1e-5, rel=1e-6)


def test_dp_sgd_as_others_account_it() -> None:
    """MNIST in Abadi et al.'s setting: noise 1.1, batches of 256 of 60,000, 60 epochs. TF Privacy's tutorial has 3.56
    at delta 1e-5 by the older conversion from RDP, with which ours is never larger.
    """
    found = sampled_epsilon([(1.1, 256 / 60_000, 14_100)], 1e-5)
    assert 2.5 < found < 3.56
    assert sampled_epsilon([(1.1, 256 / 60_000, 7_000), (1.1, 256 / 60_000, 7_100)], 1e-5) == pytest.approx(found)
    assert sampled_epsilon([], 1e-5) == 0
    assert sampled_epsilon([(2.0, 1.0, 4)], 1e-5) >= gaussian_epsilon([1.0], 1e-5)  # RDP is an upper bound


def test_the_noise_for_a_target_reaches_it() -> None:
    multiplier = sampled_noise(4.0, 1e-5, 0.1, 40)
    assert 3.9 < sampled_epsilon([(multiplier, 0.1, 40)], 1e-5) <= 4.0 * (1 + 1e-9)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-3, 50.0, 1e7, 1e36])
def test_any_target_gives_a_noise_or_one_line(
    epsilon: float, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        assert sampled_epsilon([(sampled_noise(epsilon, 1e-5, 0.1, 24), 0.1, 24)], 1e-5) <= epsilon
    except LegolmError as error:
        assert "\n" not in str(error)
    assert Budget(DpConfig(level="client", epsilon=epsilon), [{"a"}] * 3).multiplier > 0
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


everyone = [{"a", "b"}] * 10


def test_a_run_ends_before_the_round_that_would_pass_its_budget() -> None:
    dp = DpConfig(level="client", noise_multiplier=2.0, epsilon=4.5)
    budget = Budget(dp, everyone)
    assert budget.epsilon(budget.rounds) <= 4.5 < budget.epsilon(budget.rounds + 1)
    assert budget.rounds == 4  # of multiplier 2 they are one of 1: 4.38
    assert Budget(DpConfig(level="client", noise_multiplier=0.1, epsilon=5.0), everyone).rounds == 0
    assert Budget(DpConfig(level="client", noise_multiplier=0.1), everyone).rounds == 10


def test_a_target_gives_the_noise_for_the_client_who_is_asked_most() -> None:
    asked = [{"a"}, {"a", "b"}, {"b"}, {"a"}]  # three rounds of a
    budget = Budget(DpConfig(level="client", epsilon=3.0), asked)
    assert budget.epsilon(4) == pytest.approx(3.0, rel=1e-6)
    assert budget.rounds == 4
    assert budget.multiplier == pytest.approx(Budget(DpConfig(level="client", epsilon=3.0), [{"a"}] * 3).multiplier)
    assert budget.epsilon(1) < budget.epsilon(2) == budget.epsilon(3) < budget.epsilon(4)


def test_more_rounds_than_planned_share_what_is_left_of_the_budget() -> None:
    dp = DpConfig(level="client", epsilon=3.0)
    first = Budget(dp, everyone[:4]).multiplier
    resumed = Budget(dp, everyone, [first] * 3)
    assert resumed.multiplier > first
    assert resumed.epsilon(10) == pytest.approx(3.0, rel=1e-6)
    with pytest.raises(LegolmError, match="is spent by the 4 rounds"):
        _ = Budget(dp, everyone, [first] * 4).multiplier


@given(budget=st.floats(0.1, 50), noise=st.floats(0.3, 20), rounds=st.integers(0, 60))
@settings(max_examples=12)
def test_no_budget_is_ever_passed(budget: float, noise: float, rounds: int) -> None:
    found = Budget(DpConfig(level="client", epsilon=budget, noise_multiplier=noise), [{"a"}] * rounds)
    assert found.epsilon(found.rounds) <= budget * (1 + 1e-6)
    assert found.rounds == rounds or found.epsilon(found.rounds + 1) > budget


def test_within_by_hand() -> None:
    assert [within(budget, float, 5) for budget in (0.5, 1, 3.9, 9)] == [0, 1, 3, 5]


def test_noise_beside_signal_by_hand() -> None:
    assert noise_to_signal(1.0, 1_000_000, 8) == 125
    assert noise_to_signal(0.5, 100, 50) == 0.1
