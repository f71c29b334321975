"""HeteAgg in factor form: its invariants, and numbers checked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.adapter import Change, Tensors, init_factors
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig, ServerConfig
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
UP_A, UP_B = "layers.1.mlp.up_proj.A", "layers.1.mlp.up_proj.B"


def start(rank: int = 2, targets: tuple[str, ...] = ("up_proj", "o_proj"), eta: float = 1.0) -> Start:
    factors = init_factors(SHAPE, targets, rank, seed=0)
    return Start(SHAPE, lambda: dict(factors), rank, server=ServerConfig(server_learning_rate=eta))


def scheme_of(start: Start, **settings: object) -> Scheme:
    scheme = make_scheme(AggregateConfig(**{"form": "factor"} | settings))
    scheme.begin(start)
    return scheme


def change(delta: Tensors, examples: int, rank: int = 2) -> Change:
    return Change(delta, {}, examples, rank)


def random_change(scheme: Scheme, coverage: Coverage, rank: int, examples: int, seed: int) -> Change:
    generator = torch.Generator().manual_seed(seed)
    payload = scheme.payload(coverage, rank)
    return change({k: torch.randn(t.shape, generator=generator) for k, t in payload.items()}, examples, rank)


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
        scheme.add(change({UP_B: torch.full((2, 1), 4.0)}, 1, rank=1), first)
        scheme.add(change({UP_B: torch.full((2, 1), 8.0)}, 3, rank=1), second)
        scheme.finish()
        assert scheme.state()[UP_B].flatten().tolist() == rows


def test_server_learning_rate_scales_the_step() -> None:
    scheme = scheme_of(start(rank=1, targets=("up_proj",), eta=0.25))
    scheme.add(change({UP_B: torch.full((3, 1), 8.0)}, 5, rank=1), FULL)
    scheme.finish()
    assert scheme.state()[UP_B].flatten().tolist() == [2.0, 2.0, 2.0]


@given(st.permutations(range(4)), st.sampled_from(["coverage_mean", "global_fill"]))
@settings(max_examples=30)
def test_order_of_arrival_changes_nothing(order: list[int], denominator: str) -> None:
    cases = [(FULL, 2, 3), (LAYER_1, 1, 10), (OTHER, 2, 1), (LAYER_1, 2, 1000)]
    results = []
    for sequence in (range(4), order):
        scheme = scheme_of(start(), denominator=denominator)
        for i in sequence:
            coverage, rank, examples = cases[i]
            scheme.add(random_change(scheme, coverage, rank, examples, seed=i), coverage)
        scheme.finish()
        results.append(scheme.state())
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("denominator", ["coverage_mean", "global_fill"])
def test_what_nobody_covers_does_not_move(denominator: str) -> None:
    scheme = scheme_of(start(), denominator=denominator)
    before = scheme.state()
    for seed in range(3):
        scheme.add(random_change(scheme, LAYER_1, 1, 5, seed), LAYER_1)
    scheme.finish()
    found = scheme.state()
    assert torch.equal(found["layers.0.mlp.up_proj.A"], before["layers.0.mlp.up_proj.A"])
    assert torch.equal(found[UP_B][1], before[UP_B][1])  # neuron 1
    assert torch.equal(found[UP_B][:, 1], before[UP_B][:, 1])  # rank row 1
    assert torch.equal(found[UP_A][1], before[UP_A][1])
    assert bool((found[UP_B][[0, 2], 0] != before[UP_B][[0, 2], 0]).all())
