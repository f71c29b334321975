"""Schemes that compare whole changes: by hand, and under coverage."""

from __future__ import annotations

import math

import pytest
import torch
from rounds import BLOCKS, FULL, RANK, Client, add, client, new

from legolm.aggregate.nearest import closest, mixed
from legolm.config import AggregateConfig

UP = "layers.1.mlp.up_proj.B"


def after(scheme: str, changes: list[tuple[str, float]], **settings: float) -> list[float]:
    """What the neurons of layer 1 move by (rank row 0), where these blocks change all that they hold by so much."""
    made = new(AggregateConfig(scheme=scheme, **settings))  # type: ignore[arg-type]
    for block, value in changes:
        one = client(made, BLOCKS[block], RANK, 1, seed=0)
        delta = {key: torch.full_like(tensor, value) for key, tensor in one.delta.items()}
        add(made, Client(BLOCKS[block], RANK, 1, one.received, delta))
    before = made.payload(FULL, RANK)[UP][:, 0]
    made.finish()
    return [round(one, 4) for one in (made.payload(FULL, RANK)[UP][:, 0] - before).tolist()]


def test_multi_krum_averages_those_who_are_near_to_each_other() -> None:
    # f = 1 of five: the four whose two nearest are nearest.
    values = [("full", value) for value in (1.0, 2.0, 3.0, 4.0, 1e6)]
    assert after("multi_krum", values) == [2.5] * 5
    assert after("multi_krum", values, hostile=0.0) == [200002.0] * 5
    # f = 2 of five: the three whose nearest is nearest, 0, 0.1 and then 1.
    assert after("multi_krum", [("full", v) for v in (0.0, 0.1, 1.0, 5.0, -7.0)], hostile=0.4) == pytest.approx(
        [1.1 / 3] * 5, abs=1e-4
    )


def test_mixing_takes_the_median_of_means_of_neighbours() -> None:
    # f = 1 of four: the means of three neighbours are 2, 2, 2 and 335 (of 2, 3 and 1000).
    assert after("nearest_mixing", [("full", v) for v in (1.0, 2.0, 3.0, 1000.0)]) == [2.0] * 5


@pytest.mark.parametrize("scheme", ["multi_krum", "nearest_mixing"])
def test_a_thin_entry_is_judged_by_what_its_holders_sent_elsewhere(scheme: str) -> None:
    """Neurons 0, 3 and 4 of layer 1 are held by two, one of whom lies: among all the liar is far off."""
    there = [("narrow", 1.0)] * 6 + [("full", 1.0), ("full", -1e3)]
    assert after(scheme, there) == [1.0] * 5
    assert after("median", there) == [-499.5, 1.0, 1.0, -499.5, -499.5]


def test_pieces_by_hand() -> None:
    distance = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 9.0], [4.0, 9.0, 0.0]], dtype=torch.float64)
    assert closest(distance, 2).tolist() == [[True, True, False], [True, True, False], [True, False, True]]
    changes = torch.tensor([1.0, math.nan, 5.0, math.nan]).view(4, 1, 1).double()
    members = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]).bool()
    found = mixed(changes, members)[:, 0, 0]
    assert found[0] == 3
    assert found[1].isnan()
