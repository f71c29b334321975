"""HeteAgg in factor form: its invariants, and numbers checked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.adapter import Tensors, Update, init_factors
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
UP_A, UP_B = "layers.1.mlp.up_proj.A", "layers.1.mlp.up_proj.B"


def start(rank: int = 2, targets: tuple[str, ...] = ("up_proj", "o_proj")) -> Start:
    return Start(SHAPE, init_factors(SHAPE, targets, rank, seed=0), rank, 2.0)


def scheme_of(adapter: Start, **settings: object) -> Scheme:
    return make_scheme(adapter, AggregateConfig(**{"form": "factor"} | settings))


def update(delta: Tensors, examples: int, rank: int = 2, client: str = "a") -> Update:
    return Update("r", 1, client, "b", "f", "c", "h", examples, rank, 2.0, delta, {})


def random_update(scheme: Scheme, coverage: Coverage, rank: int, examples: int, seed: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    payload = scheme.payload(coverage, rank)
    return update({k: torch.randn(t.shape, generator=generator) for k, t in payload.items()}, examples, rank)


FULL = Coverage.full(SHAPE)
LAYER_1 = Coverage(SHAPE, (1,), ((0,),), ((0, 2),))
OTHER = Coverage(SHAPE, (0, 1), ((1,), (0, 1)), ((1,), (1, 2)))


def test_the_two_denominators_by_hand() -> None:
    # Row 0 of B is held by both clients, row 2 by the first, row 1 by the second; n = 1 and 3.
    first, second = Coverage(SHAPE, (1,), ((0, 1),), ((0, 2),)), Coverage(SHAPE, (1,), ((0, 1),), ((0, 1),))
    expected = {
        "coverage_mean": [(1 * 4 + 3 * 8) / 4, 8, 4],
        "global_fill": [(1 * 4 + 3 * 8) / 4, 3 * 8 / 4, 1 * 4 / 4],
    }
    for denominator, rows in expected.items():
        adapter = start(rank=1, targets=("up_proj",))
        scheme = scheme_of(adapter, denominator=denominator)
        scheme.add(update({UP_B: torch.full((2, 1), 4.0)}, 1, rank=1), first)
        scheme.add(update({UP_B: torch.full((2, 1), 8.0)}, 3, rank=1, client="b"), second)
        found = scheme.finish()
        assert found.factors[UP_B].flatten().tolist() == rows
        assert found.weight[UP_B].flatten().tolist() == [4.0, 3.0, 1.0]


def test_server_learning_rate_scales_the_step() -> None:
    adapter = start(rank=1, targets=("up_proj",))
    scheme = scheme_of(adapter, server_learning_rate=0.25)
    scheme.add(update({UP_B: torch.full((3, 1), 8.0)}, 5, rank=1), FULL)
    assert scheme.finish().factors[UP_B].flatten().tolist() == [2.0, 2.0, 2.0]


@given(st.permutations(range(4)), st.sampled_from(["coverage_mean", "global_fill"]))
@settings(max_examples=30)
def test_order_of_arrival_changes_nothing(order: list[int], denominator: str) -> None:
    cases = [(FULL, 2, 3), (LAYER_1, 1, 10), (OTHER, 2, 1), (LAYER_1, 2, 1000)]
    results = []
    for sequence in (range(4), order):
        scheme = scheme_of(start(), denominator=denominator)
        for i in sequence:
            coverage, rank, examples = cases[i]
            scheme.add(random_update(scheme, coverage, rank, examples, seed=i), coverage)
        results.append(scheme.finish())
    for key in results[0].factors:
        torch.testing.assert_close(results[0].factors[key], results[1].factors[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("denominator", ["coverage_mean", "global_fill"])
def test_what_nobody_covers_does_not_move(denominator: str) -> None:
    adapter = start()
    scheme = scheme_of(adapter, denominator=denominator)
    for seed in range(3):
        scheme.add(random_update(scheme, LAYER_1, 1, 5, seed), LAYER_1)
    found = scheme.finish()
    assert torch.equal(found.factors["layers.0.mlp.up_proj.A"], adapter.factors["layers.0.mlp.up_proj.A"])
    assert torch.equal(found.factors[UP_B][1], adapter.factors[UP_B][1])  # neuron 1
    assert torch.equal(found.factors[UP_B][:, 1], adapter.factors[UP_B][:, 1])  # rank row 1
    assert torch.equal(found.factors[UP_A][1], adapter.factors[UP_A][1])
    assert bool((found.factors[UP_B][[0, 2], 0] != adapter.factors[UP_B][[0, 2], 0]).all())
    for key, weight in found.weight.items():
        moved = found.factors[key] != adapter.factors[key]
        assert not bool((moved & (weight == 0)).any())


def test_averaged_to_zero_and_untrained_are_told_apart() -> None:
    scheme = scheme_of(start(rank=1, targets=("up_proj",)))
    half = Coverage(SHAPE, (1,), ((0, 1),), ((0,),))
    scheme.add(update({UP_B: torch.ones(1, 1)}, 2, rank=1), half)
    scheme.add(update({UP_B: -torch.ones(1, 1)}, 2, rank=1, client="b"), half)
    found = scheme.finish()
    assert found.factors[UP_B].flatten().tolist() == [0.0, 0.0, 0.0]
    assert found.weight[UP_B].flatten().tolist() == [4.0, 0.0, 0.0]
