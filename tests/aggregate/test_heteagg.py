"""HeteAgg in factor form: the invariants of DESIGN section 2, and numbers checked by hand."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.aggregate import Scheme, make_scheme
from legolm.aggregate.heteagg import most_salient
from legolm.config import AggregateConfig
from legolm.coverage import Coverage, init_factors
from legolm.models import Shape
from legolm.types import GlobalAdapter, Tensors, Update

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
UP_A, UP_B = "layers.1.mlp.up_proj.A", "layers.1.mlp.up_proj.B"


def start(rank: int = 2, targets: tuple[str, ...] = ("up_proj", "o_proj")) -> GlobalAdapter:
    factors = init_factors(SHAPE, targets, rank, seed=0)
    return GlobalAdapter(factors, {key: torch.zeros_like(t) for key, t in factors.items()}, rank, 2.0)


def scheme_of(adapter: GlobalAdapter, **settings: object) -> Scheme:
    return make_scheme(adapter, AggregateConfig(**settings))


def update(delta: Tensors, examples: int, rank: int = 2, client: str = "a") -> Update:
    return Update("r", 1, client, "b", "f", "c", "h", examples, rank, 2.0, delta)


def random_update(scheme: Scheme, coverage: Coverage, rank: int, examples: int, seed: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    payload = scheme.payload(coverage, rank)
    return update({k: torch.randn(t.shape, generator=generator) for k, t in payload.items()}, examples, rank)


FULL = Coverage.full(SHAPE)
LAYER_1 = Coverage(SHAPE, (1,), ((0,),), ((0, 2),))
OTHER = Coverage(SHAPE, (0, 1), ((1,), (0, 1)), ((1,), (1, 2)))


@pytest.mark.parametrize("denominator", ["coverage_mean", "global_fill"])
def test_one_full_client_gets_its_own_update_back(denominator: str) -> None:
    adapter = start()
    scheme = scheme_of(adapter, denominator=denominator)
    one = random_update(scheme, FULL, 2, examples=7, seed=1)
    scheme.add(one, FULL)
    found = scheme.finish()
    for key, before in adapter.factors.items():
        torch.testing.assert_close(found.factors[key], before + one.delta[key])


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


@given(
    st.permutations(range(4)),
    st.sampled_from(["coverage_mean", "global_fill"]),
    st.sampled_from(["structure", "saliency"]),
)
@settings(max_examples=30, deadline=None)
def test_order_of_arrival_changes_nothing(order: list[int], denominator: str, mask: str) -> None:
    cases = [(FULL, 2, 3), (LAYER_1, 1, 10), (OTHER, 2, 1), (LAYER_1, 2, 1000)]
    results = []
    for sequence in (range(4), order):
        scheme = scheme_of(start(), denominator=denominator, mask=mask)
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


def test_saliency_keeps_the_largest_changes_and_never_enters_the_denominator() -> None:
    # A block that keeps 2 of 3 neurons in one of two layers keeps some weights; its update loses the smallest entries.
    coverage = LAYER_1
    kept = round((1 - coverage.sparsity) * 2)
    scheme = scheme_of(start(rank=1, targets=("up_proj",)), mask="saliency")
    scheme.add(update({UP_B: torch.tensor([[1.0], [-9.0]])}, 4, rank=1), coverage)
    found = scheme.finish()
    assert kept == 1
    assert found.factors[UP_B].flatten().tolist() == [0.0, 0.0, -9.0]
    assert found.weight[UP_B].flatten().tolist() == [4.0, 0.0, 4.0]


def test_most_salient_counts_and_ties() -> None:
    assert most_salient(torch.tensor([[3.0, -4.0], [1.0, 3.0]]), 0.5).tolist() == [[True, True], [False, False]]
    assert int(most_salient(torch.ones(10), 0.25).sum()) == 8


def test_a_round_goes_on_from_a_saved_state() -> None:
    straight, first = scheme_of(start()), scheme_of(start())
    for scheme in (straight, first):
        scheme.add(random_update(scheme, OTHER, 2, 3, seed=0), OTHER)
        scheme.finish()
    second = scheme_of(start())
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for scheme in (straight, second):
        scheme.add(random_update(scheme, FULL, 2, 3, seed=1), FULL)
    one, two = straight.finish(), second.finish()
    assert all(torch.equal(one.factors[key], two.factors[key]) for key in one.factors)
    assert all(torch.equal(one.weight[key], two.weight[key]) for key in one.weight)


def test_without_updates_nothing_moves() -> None:
    adapter = start()
    found = scheme_of(adapter).finish()
    assert all(torch.equal(found.factors[key], adapter.factors[key]) for key in adapter.factors)


def test_against_a_float64_reference() -> None:
    """Dense loops over entries, written from the formula alone."""
    rng = random.Random(0)
    adapter = start()
    scheme = scheme_of(adapter, server_learning_rate=0.7)
    cases = [(FULL, 2, 3), (LAYER_1, 1, 10), (OTHER, 2, 1)]
    reference: dict[str, list[list[tuple[float, float]]]] = {}
    for coverage, rank, examples in cases:
        one = random_update(scheme, coverage, rank, examples, seed=rng.randrange(1000))
        scheme.add(one, coverage)
        for key, delta in one.delta.items():
            shape = adapter.factors[key].shape
            cells = reference.setdefault(key, [[(0.0, 0.0)] * shape[1] for _ in range(shape[0])])
            layer, module = int(key.split(".")[1]), key.split(".", 2)[2].rpartition(".")[0]
            rows = coverage.rows(layer, module) if key.endswith("B") else None
            cols = coverage.cols(layer, module) if key.endswith("A") else None
            for i in range(delta.shape[0]):
                for j in range(delta.shape[1]):
                    r = i if rows is None else int(rows[i])
                    c = j if cols is None else int(cols[j])
                    n, d = cells[r][c]
                    cells[r][c] = (n + examples * float(delta[i, j]), d + examples)
    found = scheme.finish()
    for key, cells in reference.items():
        for r, row in enumerate(cells):
            for c, (n, d) in enumerate(row):
                before = float(adapter.factors[key][r, c])
                assert float(found.factors[key][r, c]) == pytest.approx(before + (0.7 * n / d if d else 0), rel=1e-6)
