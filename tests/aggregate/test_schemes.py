"""The invariants of every scheme, and each scheme against the dense float64 reference."""

from __future__ import annotations

import random

import pytest
import torch
from dense_reference import Client, exact_form, factor_form, mean_product, placed, truncated
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import BLOCKS, FULL, RANK, SHAPE, add, client, close, new, products

from legolm.aggregate import Scheme
from legolm.config import SCHEMES, AggregateConfig

ROBUST = ("median", "trimmed_mean", "multi_krum", "nearest_mixing")
FORMS = {
    **{name: AggregateConfig(scheme=name) for name in SCHEMES if name != "heteagg"},
    "heteagg": AggregateConfig(form="factor"),
    "heteagg fill": AggregateConfig(form="factor", denominator="global_fill"),
    "heteagg frozen": AggregateConfig(form="frozen_side"),
    "heteagg redrawn": AggregateConfig(redraw=2),
    "heteagg exact": AggregateConfig(form="exact", residual="fold"),
}
ANY_BLOCK = [name for name in FORMS if name.startswith("heteagg") or name in ROBUST]
ANY_RANK = [*ANY_BLOCK, "hetlora", "flexlora", "flora", "raflora"]

many = st.lists(
    st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, RANK), st.integers(1, 50), st.integers(0, 99)),
    min_size=1,
    max_size=5,
)


def make_clients(scheme: Scheme, drawn: list[tuple[str, int, int, int]], blocks: bool, ranks: bool) -> list[Client]:
    return [
        client(scheme, BLOCKS[block] if blocks else FULL, rank if ranks else RANK, n, seed)
        for block, rank, n, seed in drawn
    ]


@pytest.mark.parametrize("name", FORMS)
def test_one_full_client_gets_its_own_update_back(name: str) -> None:
    scheme = new(FORMS[name])
    one = client(scheme, FULL, RANK, n=7, seed=1)
    add(scheme, one)
    scheme.finish()
    if name in ("flexlora", "raflora", "flora", "fedex_lora", "heteagg exact"):
        names = {key.rpartition(".")[0] for key in one.delta}
        close(products(scheme), {n: one.ended(f"{n}.B") @ one.ended(f"{n}.A") for n in names})
    else:
        close(scheme.payload(FULL, RANK), {key: one.ended(key) for key in one.delta})


@pytest.mark.parametrize("name", FORMS)
@given(drawn=many, shuffle=st.randoms())
@settings(max_examples=8)
def test_order_of_arrival_changes_nothing(name: str, drawn: list, shuffle: random.Random) -> None:  # type: ignore[type-arg]
    results = []
    for turn in range(2):
        scheme = new(FORMS[name])
        clients = make_clients(scheme, drawn, name in ANY_BLOCK, name in ANY_RANK)
        if turn:
            shuffle.shuffle(clients)
        for one in clients:
            add(scheme, one)
        scheme.finish()
        results.append(products(scheme))
    close(results[0], results[1])


@pytest.mark.parametrize("name", ANY_BLOCK)
def test_what_nobody_covers_does_not_move(name: str) -> None:
    scheme = new(FORMS[name])
    for seed in range(3):
        add(scheme, client(scheme, BLOCKS["layer 1"], 2, 5, seed))
    scheme.finish()
    after = products(scheme)
    assert not after["layers.0.mlp.up_proj"].any()
    moved = after["layers.1.mlp.up_proj"].abs().sum(1) > 1e-6
    assert moved.tolist() == [True, False, True, False, False]  # neurons 0 and 2
    if name in (
        "heteagg exact",
        "heteagg frozen",
        "heteagg redrawn",
    ):  # in factor form B moves for all, and meets the start's A there
        moved = after["layers.1.mlp.down_proj"].abs().sum(0) > 1e-6
        assert moved.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("name", FORMS)
def test_a_run_goes_on_from_a_saved_state(name: str) -> None:
    straight, saved = new(FORMS[name]), new(FORMS[name])
    for seed in range(3):
        for scheme in (straight, saved):
            for i in range(2):
                add(scheme, client(scheme, FULL, RANK, 3 + i, seed=2 * seed + i))
            scheme.finish()
        saved = new(FORMS[name], state={key: tensor.clone() for key, tensor in saved.state().items()})
    one, two = straight.state(), saved.state()
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", FORMS)
def test_without_updates_nothing_moves(name: str) -> None:
    scheme = new(FORMS[name])
    before = products(scheme)
    scheme.finish()
    close(products(scheme), before)


@given(drawn=many, denominator=st.sampled_from(["coverage_mean", "global_fill"]), eta=st.sampled_from([1.0, 0.3]))
@settings(max_examples=30)
def test_factor_form_against_the_reference(drawn: list, denominator: str, eta: float) -> None:  # type: ignore[type-arg]
    config = AggregateConfig(form="factor", denominator=denominator, server_learning_rate=eta)  # type: ignore[arg-type]
    scheme = new(config)
    theta = scheme.adapter(FULL, RANK)
    for _ in range(2):
        clients = make_clients(scheme, drawn, True, True)
        expected = factor_form(SHAPE, theta, RANK, clients, denominator, eta)
        for one in clients:
            add(scheme, one)
        scheme.finish()
        theta = scheme.adapter(FULL, RANK)
        close(theta, expected)


@given(drawn=many, denominator=st.sampled_from(["coverage_mean", "global_fill"]), eta=st.sampled_from([1.0, 0.3]))
@settings(max_examples=30)
def test_exact_form_against_the_reference(drawn: list, denominator: str, eta: float) -> None:  # type: ignore[type-arg]
    """Two rounds with everything of the residual kept: S is exact, and G is its best approximation."""
    config = AggregateConfig(
        form="exact", residual="fold", residual_rank=6, denominator=denominator, server_learning_rate=eta
    )  # type: ignore[arg-type]
    scheme = new(config)
    product = {name: torch.zeros_like(tensor) for name, tensor in products(scheme).items()}
    for _ in range(2):
        clients = make_clients(scheme, drawn, True, True)
        product = exact_form(SHAPE, product, clients, denominator, eta, RANK)
        for one in clients:
            add(scheme, one)
        scheme.finish()
        close(products(scheme), product, 1e-4)
        sent = scheme.payload(FULL, RANK)
        for name, matrix in product.items():
            best = matrix - truncated(matrix, RANK)
            error = matrix - sent[f"{name}.B"].double() @ sent[f"{name}.A"].double()
            assert float(error.norm()) <= float(best.norm()) * (1 + 1e-5) + 1e-5 * float(matrix.norm())


def test_exact_form_slices_like_the_product() -> None:
    scheme = new(FORMS["heteagg exact"])
    for seed, block in enumerate(BLOCKS.values()):
        add(scheme, client(scheme, block, 2, 3 + seed, seed))
    scheme.finish()
    whole, narrow = products(scheme), products(scheme, BLOCKS["narrow"])
    torch.testing.assert_close(narrow["layers.0.mlp.up_proj"], whole["layers.0.mlp.up_proj"][[1, 3, 4]])
    torch.testing.assert_close(narrow["layers.1.mlp.down_proj"], whole["layers.1.mlp.down_proj"][:, [1, 2]])


def test_exact_form_keeps_the_norm_of_a_and_refills_empty_directions() -> None:
    scheme = new(FORMS["heteagg exact"])
    start = scheme.payload(FULL, RANK)
    one = client(scheme, FULL, 1, 4, seed=0)
    add(scheme, one)
    scheme.finish()
    after = scheme.payload(FULL, RANK)
    for key, tensor in after.items():
        if key.endswith(".A"):
            norms = tensor.norm(dim=1)
            torch.testing.assert_close(norms[:1], start[key].norm(dim=1).mean()[None])
            assert torch.equal(tensor[2:], start[key][2:])  # rank 1 changed by rank 1: at most two directions
            assert not after[key[:-1] + "B"][:, 2:].any()


def test_dense_clients_of_other_rank_against_the_reference() -> None:
    for name in ("flexlora", "raflora", "flora", "hetlora", "fedex_lora"):
        scheme = new(FORMS[name])
        ranks = (3, 3, 3) if name == "fedex_lora" else (1, 3, 2)
        clients = [client(scheme, FULL, rank, n, seed=n) for rank, n in zip(ranks, (2, 5, 9), strict=True)]
        for one in clients:
            add(scheme, one)
        scheme.finish()
        for module, found in products(scheme).items():
            expected = mean_product(clients, module)
            if name == "flexlora":
                expected = truncated(expected, RANK)
            if name == "raflora":  # row j over those that have it
                expected = torch.zeros_like(expected)
                for j in range(RANK):
                    having = [c for c in clients if c.rank > j]
                    for c in having:
                        share = c.n / sum(h.n for h in having)
                        expected += share * c.ended(f"{module}.B")[:, j : j + 1] @ c.ended(f"{module}.A")[j : j + 1]
                expected = truncated(expected, RANK)
            if name == "hetlora":
                norms = [float((c.ended(f"{module}.B") @ c.ended(f"{module}.A")).norm()) for c in clients]
                a, b = (
                    sum(
                        w / sum(norms) * placed(SHAPE, FULL, f"{module}.{side}", RANK, c.ended(f"{module}.{side}"))[0]
                        for w, c in zip(norms, clients, strict=True)
                    )
                    for side in "AB"
                )
                expected = b @ a  # type: ignore[operator]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_folds_are_shipped_once_and_add_up() -> None:
    for name in ("flora", "fedex_lora"):
        scheme = new(FORMS[name])
        for seed in range(2):
            for i in range(2):
                add(scheme, client(scheme, FULL, RANK, 3 + i, seed=2 * seed + i))
            scheme.finish()
        each = 2 * RANK if name == "flora" else 3 * RANK
        key = "layers.0.mlp.up_proj.A"
        assert [scheme.fold(FULL, since)[key].shape[0] for since in (0, 1)] == [2 * each, each]
        assert scheme.fold(FULL, 2) == {}
        assert scheme.adapter(FULL, RANK)[key].shape[0] == 2 * each + (0 if name == "flora" else RANK)


def test_frozen_side_sends_one_factor_and_averages_products() -> None:
    scheme = new(FORMS["heteagg frozen"])
    clients = [client(scheme, FULL, RANK, n, seed=n) for n in (1, 3)]
    assert set(clients[0].delta) == {
        f"layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.q_proj.B", "self_attn.o_proj.A", "mlp.up_proj.B", "mlp.down_proj.A")
    }
    frozen = scheme.adapter(FULL, RANK)
    for one in clients:
        add(scheme, one)
    scheme.finish()
    up, down = "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"
    mean = sum(c.n / 4 * c.ended(f"{up}.B") @ frozen[f"{up}.A"].double() for c in clients)
    torch.testing.assert_close(products(scheme)[up], mean, rtol=1e-5, atol=1e-5)
    for tensor in (frozen[f"{up}.A"], frozen[f"{down}.B"].T):
        torch.testing.assert_close(tensor @ tensor.T, torch.eye(RANK), rtol=1e-5, atol=1e-5)
    assert not frozen[f"{down}.A"].any()
    assert torch.equal(scheme.adapter(FULL, RANK)[f"{up}.A"], frozen[f"{up}.A"])


def test_a_liar_moves_the_mean_and_not_the_median_or_the_trimmed_mean() -> None:
    key = "layers.0.mlp.up_proj.B"
    found = {}
    for name, config in {
        "heteagg": AggregateConfig(form="factor"),
        "median": AggregateConfig(scheme="median"),
        "trimmed_mean": AggregateConfig(scheme="trimmed_mean", trim=0.25),
    }.items():
        scheme = new(config)
        for value in (1.0, 2.0, 3.0, 1e6):
            one = client(scheme, FULL, RANK, 1, seed=0)
            add(
                scheme,
                Client(FULL, RANK, 1, one.received, {k: torch.full_like(t, value) for k, t in one.delta.items()}),
            )
        scheme.finish()
        found[name] = float(scheme.payload(FULL, RANK)[key][0, 0])
    assert found["heteagg"] > 1e5
    assert found["median"] == found["trimmed_mean"] == 2.5


def test_median_and_trimmed_mean_count_only_those_who_hold_the_entry() -> None:
    for name in ("median", "trimmed_mean"):
        scheme = new(AggregateConfig(scheme=name))
        for block, value in (("full", 1.0), ("full", 3.0), ("layer 1", 8.0)):
            one = client(scheme, BLOCKS[block], RANK, 1, seed=0)
            delta = {key: torch.full_like(t, value) for key, t in one.delta.items()}
            add(scheme, Client(BLOCKS[block], RANK, 1, one.received, delta))
        scheme.finish()
        column = scheme.payload(FULL, RANK)["layers.1.mlp.up_proj.B"][:, 0].tolist()
        held, rest = 3.0, 2.0  # of three the middle one, of two the mean
        assert column == [held, rest, held, rest, rest]
