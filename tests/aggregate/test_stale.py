"""Late changes: each entry counts by how often it moved since the client had it."""

from __future__ import annotations

import torch
from dense_reference import placed
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import BLOCKS, FULL, RANK, SHAPE, TARGETS

from legolm.adapter import Change, Tensors, initial_factors, parse_key, slice_factors
from legolm.aggregate import discounted, moved
from legolm.block import Coverage

LLM = initial_factors(SHAPE, TARGETS, RANK, 0)
Member = tuple[str, int]
members = st.lists(st.tuples(st.sampled_from([*BLOCKS]), st.integers(1, RANK)), max_size=3)


def ones(coverage: Coverage, rank: int) -> Change:
    return Change({k: torch.ones_like(t) for k, t in slice_factors(coverage, LLM, rank).items()}, {}, 1, rank)


def held(key: str, member: Member) -> torch.Tensor:
    """1 where the member holds the entry of the LLM's factor."""
    coverage, rank = BLOCKS[member[0]], member[1]
    if parse_key(key)[0] not in coverage.layers:
        return torch.zeros(LLM[key].shape, dtype=torch.float64)
    return placed(SHAPE, coverage, key, RANK, slice_factors(coverage, {key: LLM[key]}, rank)[key])[1]


@settings(max_examples=40)
@given(block=st.sampled_from([*BLOCKS]), rank=st.integers(1, RANK), since=st.lists(members, max_size=4))
def test_an_entry_ages_by_the_rounds_that_moved_it(block: str, rank: int, since: list[list[Member]]) -> None:
    coverage = BLOCKS[block]
    rounds = [moved(SHAPE, RANK, [(BLOCKS[name], own) for name, own in one]) for one in since]
    found = discounted(ones(coverage, rank), coverage, rounds).delta
    for key, value in found.items():
        age = torch.zeros(LLM[key].shape, dtype=torch.float64)
        for one in since:
            age += torch.stack([torch.zeros_like(age), *(held(key, member) for member in one)]).amax(0)
        full, mine = placed(SHAPE, coverage, key, RANK, value)
        torch.testing.assert_close(full, mine * (1 + age) ** -0.5)


def test_by_hand() -> None:
    """A block of layer 1 alone waited two rounds in which the whole LLM's and its own layer moved."""
    block = BLOCKS["layer 1"]
    since = [moved(SHAPE, RANK, [(FULL, RANK)]), moved(SHAPE, RANK, [(block, 1)])]
    found = discounted(ones(FULL, RANK), FULL, since).delta
    up = found["layers.1.mlp.up_proj.B"]  # (neurons, rank); neurons 0 and 2 are the block's, at rank 1
    moved_twice, moved_once = 3**-0.5, 2**-0.5
    expected = torch.full((5, RANK), moved_once)
    expected[[0, 2], 0] = moved_twice
    torch.testing.assert_close(up, expected)
    torch.testing.assert_close(found["layers.0.mlp.up_proj.B"], torch.full((5, RANK), moved_once))
    fresh: Tensors = dict(discounted(ones(FULL, RANK), FULL, [moved(SHAPE, RANK, [])]).delta)
    assert all(bool((one == 1).all()) for one in fresh.values())
