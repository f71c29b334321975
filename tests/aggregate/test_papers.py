"""The peers do what their papers, and the code published with them, do: one test a finding, in numbers."""

from __future__ import annotations

import pytest
import torch
from dense_reference import Client, exact_form, mean_product
from rounds import BLOCKS, FULL, RANK, SHAPE, TARGETS, add, client, new, products

from legolm.adapter import adapter_keys
from legolm.aggregate import Scheme, holders, make_scheme
from legolm.config import AggregateConfig

UP = "layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_directions_that_a_round_leaves_empty_learn_again(name: str) -> None:
    scheme = new(AggregateConfig(scheme=name))
    low = client(scheme, FULL, 1, 4, seed=0)
    add(scheme, low)
    scheme.finish()
    for key, a in scheme.payload(FULL, RANK).items():
        if key.endswith(".A"):  # all rows orthonormal, as a full SVD's are; B is zero where σ is
            torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-6)
            assert not scheme.payload(FULL, RANK)[f"{key[:-1]}B"][:, 1:].any()
    one = client(scheme, FULL, RANK, 4, seed=1)
    one.delta = {key: tensor if key.endswith(".B") else 0 * tensor for key, tensor in one.delta.items()}
    add(scheme, one)
    scheme.finish()
    # What B learned beside all rows of A is there: three directions, not one.
    after = scheme.payload(FULL, RANK)
    product = after[f"{UP}.B"].double() @ after[f"{UP}.A"].double()
    torch.testing.assert_close(product, one.ended(f"{UP}.B") @ one.ended(f"{UP}.A"), rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(product.float(), atol=1e-3)) == RANK


def with_changes(scheme: Scheme, *values: float) -> float:
    """What an entry of B changes by when clients that hold everything change all by these."""
    before = float(scheme.payload(FULL, RANK)[f"{UP}.B"][0, 0])
    for value in values:
        one = client(scheme, FULL, RANK, 1, seed=0)
        delta = {key: torch.full_like(tensor, value) for key, tensor in one.delta.items()}
        add(scheme, Client(FULL, RANK, 1, one.received, delta))
    scheme.finish()
    return float(scheme.payload(FULL, RANK)[f"{UP}.B"][0, 0]) - before


def test_the_trimmed_mean_trims_from_three_holders_on() -> None:
    found = {
        values: with_changes(new(AggregateConfig(scheme="trimmed_mean", trim=0.2)), *values)
        for values in ((1.0, 2.0, 1e3), (1.0, 2.0, 3.0, 1e3), (1.0, 1e3))
    }
    assert found == {(1.0, 2.0, 1e3): 2.0, (1.0, 2.0, 3.0, 1e3): 2.5, (1.0, 1e3): 500.5}
    assert with_changes(new(AggregateConfig(scheme="trimmed_mean", trim=0.0)), 1.0, 2.0, 1e3) == pytest.approx(1003 / 3)


def test_a_robust_scheme_knows_how_many_liars_it_outvotes() -> None:
    by_holders = {
        "median": [0, 0, 1, 1, 2, 2],
        "trimmed_mean": [0, 0, 1, 1, 1, 1],
        "multi_krum": [0, 0, 0, 1, 1, 1],
        "nearest_mixing": [0, 0, 0, 1, 1, 1],
        "heteagg": [None] * 6,
    }
    for name, expected in by_holders.items():
        scheme = make_scheme(AggregateConfig(scheme=name))
        assert [scheme.outvoted(count) for count in range(1, 7)] == expected
    # floor(0.4 · 5) = 2 at each end.
    assert make_scheme(AggregateConfig(scheme="trimmed_mean", trim=0.4)).outvoted(5) == 2


def test_entries_by_the_number_of_clients_that_hold_them() -> None:
    key = "layers.1.mlp.up_proj.B"  # five neurons: all hold 1, `layer 1` and the full one 0 and 2, `narrow` 1 and 2
    members = [(FULL, 3), (BLOCKS["layer 1"], 1), (BLOCKS["narrow"], 2)]
    by_hand = torch.zeros(5, 3)
    by_hand += 1
    by_hand[[0, 2], :1] += 1
    by_hand[[1, 2], :2] += 1
    counts = {count: int((by_hand == count).sum()) for count in (1, 2, 3)}
    assert holders([key], members) == counts == {1: 10, 2: 4, 3: 1}
    keys = adapter_keys(FULL, TARGETS)
    assert sum(holders(keys, members).values()) == sum(
        tensor.numel() for tensor in new(AggregateConfig(form="factor")).payload(FULL, RANK).values()
    )


@pytest.mark.parametrize("name", ["flexlora", "raflora", "heteagg"])
def test_the_llm_has_all_that_the_server_knows(name: str) -> None:
    config = AggregateConfig(scheme=name, **({"form": "exact"} if name == "heteagg" else {}))
    scheme = new(config)
    assert whole_of(scheme) == pytest.approx(0.0)  # B begins with zeros
    clients = [client(scheme, FULL, RANK, n, seed=n) for n in (1, 3)]
    for one in clients:
        add(scheme, one)
    scheme.finish()
    if name == "heteagg":
        zero = {module: torch.zeros_like(tensor) for module, tensor in products(scheme).items()}
        expected = exact_form(SHAPE, zero, clients, "coverage_mean", 1.0, RANK)[UP]
    else:
        expected = mean_product(clients, UP)
    found = scheme.whole(FULL, RANK)
    assert int(torch.linalg.matrix_rank(expected)) == 5  # of five neurons: more than the broadcast's three
    torch.testing.assert_close(found[f"{UP}.B"].double() @ found[f"{UP}.A"].double(), expected, rtol=1e-4, atol=1e-5)
    sent = scheme.payload(FULL, RANK)
    assert {tensor.shape[0] for key, tensor in sent.items() if key.endswith(".A")} == {RANK}
    again = new(config, state=scheme.state())
    assert whole_of(again) == whole_of(scheme)


def whole_of(scheme: Scheme) -> float:
    """The size of what the LLM has learned in one module."""
    found = scheme.whole(FULL, RANK)
    return float((found[f"{UP}.B"] @ found[f"{UP}.A"]).norm())


def test_past_the_crossover_the_llm_has_all_too() -> None:
    scheme = new(AggregateConfig(scheme="flexlora", server_learning_rate=0.5))
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for number in range(2):
        clients = [client(scheme, FULL, RANK, n, seed=10 * number + n) for n in (1, 3, 4)]  # rank 9 of at most 5
        for one in clients:
            add(scheme, one)
        scheme.finish()
        expected = 0.5 * expected + 0.5 * mean_product(clients, UP)
        found = scheme.whole(FULL, RANK)
        torch.testing.assert_close(
            found[f"{UP}.B"].double() @ found[f"{UP}.A"].double(), expected, rtol=1e-5, atol=1e-5
        )
