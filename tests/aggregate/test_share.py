"""How much each client counts in a round: by hand, and that nobody has more than the cap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import FULL, RANK, new

from legolm.adapter import Change
from legolm.aggregate import Weighing, capped
from legolm.config import AggregateConfig


@pytest.mark.parametrize(
    ("counts", "share", "weights"),
    [
        ((1, 1, 98), 0.5, (1, 1, 2)),  # as much as both others
        ((1, 1, 98), 0.4, (1, 1, 4 / 3)),  # 0.4 of 10 / 3
        ((1, 50, 50), 0.4, (1, 2, 2)),  # two at the cap: 0.4 of 5
        ((3, 1, 4), 0.5, (3, 1, 4)),  # nobody is above
        ((1, 99), 0.5, (1, 1)),  # 1 / 2 each is all that holds
        ((1, 1, 98), 0.2, (1, 1, 1)),  # and so is 1 / 3
        ((7,), 0.5, (1,)),
        ((1, 1, 98), 1.0, (1, 1, 98)),
    ],
)
def test_weights_by_hand(counts: tuple[float, ...], share: float, weights: tuple[float, ...]) -> None:
    found = capped(dict(zip("abc", counts, strict=False)), share)
    assert list(found.values()) == pytest.approx(weights)


counts = st.lists(st.one_of(st.integers(1, 200), st.integers(1, 10**9)), min_size=1, max_size=12)


@given(counts=counts, share=st.one_of(st.floats(0.05, 1), st.integers(1, 50).map(lambda n: 1 / n)))
@settings(max_examples=300)
def test_nobody_has_more_than_the_cap_and_below_it_examples_count(counts: list[int], share: float) -> None:
    clients = {str(i): float(n) for i, n in enumerate(counts)}
    weights = capped(clients, share)
    total = math.fsum(weights.values())
    assert all(0 < weights[id] <= max(n, 1) for id, n in clients.items())
    if len(counts) * share <= 1:
        assert set(weights.values()) == {1.0}
        return
    assert max(weights.values()) <= share * total * (1 + 1e-9)
    for id, weight in weights.items():  # who counts less than its examples has all that it may
        assert weight == clients[id] or weight == pytest.approx(share * total)
    if max(counts) <= share * sum(counts):
        assert weights == clients


def moved(config: AggregateConfig, counts: list[int], values: list[float]) -> tuple[float, dict[str, float]]:
    """What each entry of all factors moves by where client i of so many examples changes it by `values[i]`."""
    scheme = new(config)
    before = {key: tensor.clone() for key, tensor in scheme.payload(FULL, RANK).items()}
    weighing = Weighing(config, scheme)
    for i, (count, value) in enumerate(zip(counts, values, strict=True)):
        delta = {key: torch.full_like(tensor, value) for key, tensor in before.items()}
        weighing.add(str(i), Change(delta, before, count, RANK), FULL)
    shares = weighing.finish()
    steps = torch.cat([(tensor - before[key]).flatten() for key, tensor in scheme.payload(FULL, RANK).items()])
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-5, rtol=1e-5)
    return float(steps[0]), shares


@pytest.mark.parametrize(
    ("weight", "step", "shares"),
    [
        ("examples", (1 + 2 + 980) / 100, (0.01, 0.01, 0.98)),
        ("equal", (1 + 2 + 10) / 3, (1 / 3, 1 / 3, 1 / 3)),
        ("capped", (1 + 2 + 20) / 4, (0.25, 0.25, 0.5)),
    ],
)
@pytest.mark.parametrize("form", ["factor", "frozen_side"])
def test_a_round_by_hand(weight: str, step: float, shares: tuple[float, ...], form: str) -> None:
    for order in ((0, 1, 2), (2, 1, 0)):
        config = AggregateConfig(form=form, weight=weight)
        found, said = moved(config, [(1, 1, 98)[i] for i in order], [(1.0, 2.0, 10.0)[i] for i in order])
        assert found == pytest.approx(step, rel=1e-5)
        assert [said[str(order.index(i))] for i in range(3)] == pytest.approx(shares)


@given(counts=counts, share=st.floats(0.05, 1))
@settings(max_examples=40)
def test_what_waits_and_what_is_added_at_once_make_the_capped_mean(counts: list[int], share: float) -> None:
    values = [1 + i / 7 for i in range(len(counts))]
    found, shares = moved(AggregateConfig(form="frozen_side", weight_cap=share), counts, values)
    weights = capped({str(i): float(n) for i, n in enumerate(counts)}, share)
    total = math.fsum(weights.values())
    assert shares == pytest.approx({id: weight / total for id, weight in weights.items()})
    assert found == pytest.approx(sum(shares[str(i)] * value for i, value in enumerate(values)), rel=1e-4)


ROBUST = ("median", "trimmed_mean", "multi_krum", "nearest_mixing")


def test_schemes_that_weigh_in_their_own_way_say_so() -> None:
    own = {name for name in (*ROBUST, "hetlora") if not new(AggregateConfig(scheme=name)).weighs()}
    assert own == {*ROBUST, "hetlora"}
    for name in ("heteagg", "fedavg", "flora", "flexlora", "raflora", "fedex_lora"):
        assert new(AggregateConfig(scheme=name)).weighs()
    assert moved(AggregateConfig(scheme="median"), [1, 1, 98], [1.0, 2.0, 10.0]) == (pytest.approx(2.0), {})
