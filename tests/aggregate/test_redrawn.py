"""HeteAgg with a frozen side that is made anew: by hand, and against the sum over periods in float64."""

from __future__ import annotations

import torch
from dense_reference import factor_form
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import BLOCKS, FULL, RANK, SHAPE, TARGETS, add, client, close, new, products

from legolm.adapter import Change, initial_factors
from legolm.aggregate import Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape

KEY = "layers.0.mlp.up_proj"


def test_two_rounds_by_hand() -> None:
    shape = Shape("llama", layers=1, hidden=2, neurons=2, kv_groups=1, queries_per_group=1, head_dim=2)
    first, second, third = (initial_factors(shape, ["up_proj"], 1, seed, frozen_side=True) for seed in (7, 8, 9))
    scheme = make_scheme(AggregateConfig(redraw=1))
    scheme.begin(Start(shape, lambda: first, 1, seed=7))
    whole, neuron = Coverage.full(shape), Coverage(shape, (0,), ((0,),), ((1,),))
    for rows, n, coverage in (([4.0, 8.0], 1, whole), ([4.0], 3, neuron)):
        scheme.add(Change({f"{KEY}.B": torch.tensor(rows)[:, None]}, {}, n, 1), coverage)
    scheme.finish()
    # Neuron 0 is the first client's; neuron 1 has (1 · 8 + 3 · 4) / 4.
    assert scheme.fold(whole, 0)[f"{KEY}.B"].flatten().tolist() == [4, 5]
    assert torch.equal(scheme.fold(whole, 0)[f"{KEY}.A"], first[f"{KEY}.A"])
    assert (scheme.derived_seed, scheme.fold_seeds(0), scheme.payload(whole, 1)[f"{KEY}.B"].any()) == (8, [7], False)
    scheme.add(Change({f"{KEY}.B": torch.tensor([[2.0]])}, {}, 5, 1), neuron)
    scheme.finish()
    a, b = (scheme.adapter(whole, 1)[f"{KEY}.{side}"] for side in "AB")
    assert b.tolist() == [[4, 0], [5, 2]]  # rank 2
    torch.testing.assert_close(a, torch.cat([first[f"{KEY}.A"], second[f"{KEY}.A"]]))
    assert torch.equal(scheme.state()[f"{KEY}.A"], third[f"{KEY}.A"])
    # Who trained in round 2 has what round 1 folded.
    assert scheme.fold(neuron, 1)[f"{KEY}.B"].tolist() == [[2]]
    assert scheme.fold(neuron, 2) == {}


rounds = st.lists(
    st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, RANK), st.integers(1, 50), st.integers(0, 99)),
        max_size=3,
    ),
    min_size=1,
    max_size=5,
)


@given(drawn=rounds, every=st.integers(1, 3), denominator=st.sampled_from(["coverage_mean", "global_fill"]))
@settings(max_examples=30, deadline=None)
def test_the_llm_changes_by_the_sum_over_periods(
    drawn: list[list[tuple[str, int, int, int]]], every: int, denominator: str
) -> None:
    """Whoever covers what, of any rank, in rounds that may be empty; each round goes on from a saved state."""
    config = AggregateConfig(redraw=every, denominator=denominator, server_learning_rate=0.7)  # type: ignore[call-arg]
    scheme = new(config)
    total = {key: torch.zeros_like(tensor) for key, tensor in products(scheme).items()}
    theta = {key: t.double() for key, t in initial_factors(SHAPE, TARGETS, RANK, 0, True).items()}

    def learned() -> dict[str, torch.Tensor]:
        return {name: theta[f"{name}.B"] @ theta[f"{name}.A"] for name in total}

    for number, members in enumerate(drawn, start=1):
        clients = [client(scheme, BLOCKS[block], rank, n, seed) for block, rank, n, seed in members]
        if clients:
            theta = factor_form(SHAPE, theta, RANK, clients, denominator, 0.7)
        for one in clients:
            add(scheme, one)
        scheme.finish()
        if number % every == 0:
            total = {name: tensor + learned()[name] for name, tensor in total.items()}
            seed = number // every
            theta = {key: t.double() for key, t in initial_factors(SHAPE, TARGETS, RANK, seed, True).items()}
        scheme = new(config, state=scheme.state())
    whole = {name: tensor + learned()[name] for name, tensor in total.items()}
    close(products(scheme), whole)
    narrow = products(scheme, BLOCKS["narrow"], rank=RANK)
    torch.testing.assert_close(narrow["layers.1.mlp.down_proj"], products(scheme)["layers.1.mlp.down_proj"][:, [1, 2]])
    for since in range(len(drawn) + 1):
        fold, seeds = scheme.fold(FULL, since), scheme.fold_seeds(since)
        assert len(seeds) == len(drawn) // every - since // every
        assert (f"{KEY}.A" in fold) == bool(seeds)
        assert not seeds or len(fold[f"{KEY}.A"]) == RANK * len(seeds)
