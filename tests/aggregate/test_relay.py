"""Sums are associative: whoever adds up a region's changes, one for each block and rank, changes no result."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from dense_reference import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import BLOCKS, RANK, add, client, close, new

from legolm.adapter import Tensors
from legolm.config import AggregateConfig

FORMS: list[dict[str, Any]] = [
    {"form": form, "denominator": denominator}
    for form in ("factor", "frozen_side")
    for denominator in ("coverage_mean", "global_fill")
]
clients = st.lists(
    st.tuples(st.sampled_from([*BLOCKS]), st.integers(1, RANK), st.integers(1, 50), st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


def summed(region: list[Client]) -> Client:
    """Of clients with one block and rank: Σ n_k, and Σ n_k Δ_k over it."""
    n = sum(one.n for one in region)
    delta: Tensors = {key: sum(one.n / n * one.delta[key] for one in region) for key in region[0].delta}  # type: ignore[misc]
    return Client(region[0].coverage, region[0].rank, n, region[0].received, delta)


@pytest.mark.parametrize("form", FORMS, ids=lambda one: "-".join(one.values()))
@settings(max_examples=25)
@given(drawn=clients)
def test_a_region_is_one_change_for_each_block(form: dict[str, Any], drawn: list[tuple[str, int, int, int]]) -> None:
    config = AggregateConfig(**form)
    one, two = new(config), new(config)
    regions: dict[tuple[int, str, int], list[Client]] = defaultdict(list)
    for seed, (block, rank, n, region) in enumerate(drawn):
        found = client(one, BLOCKS[block], rank, n, seed)
        add(one, found)
        regions[region, block, rank].append(found)
    for region_of_one_block in regions.values():
        add(two, summed(region_of_one_block))
    one.finish()
    two.finish()
    close(one.state(), two.state())
