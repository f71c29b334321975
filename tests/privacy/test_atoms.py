"""Atoms: coordinates by who holds them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import SHAPE, session

from legolm.block import Coverage
from legolm.config import SecureConfig
from legolm.privacy import Structure, atoms, grid_of, threshold


def test_three_blocks_by_hand() -> None:
    held = {"a": np.array([0, 1, 2, 3]), "b": np.array([2, 3, 4]), "c": np.array([3, 4, 6])}
    found = {one.holders: one.places.tolist() for one in atoms(8, held)}
    assert found == {
        ("a",): [0, 1],
        ("a", "b"): [2],
        ("a", "b", "c"): [3],
        ("b", "c"): [4],
        ("c",): [6],
    }


def test_how_many_open() -> None:
    assert [SecureConfig(colluders=colluders).least for colluders in (0, 1, 2, 5)] == [3, 3, 4, 7]
    assert [threshold(m, 3) for m in (3, 4, 6, 8, 100)] == [3, 3, 5, 6, 67]
    assert [threshold(m, 5) for m in (5, 6, 7, 8, 100)] == [5, 5, 6, 6, 67]
    for m in range(3, 200):  # all but ⌈m/3⌉ - 1 suffice
        assert m - (-(-m // 3) - 1) == threshold(m, 3)
        for k in range(3, m + 1):  # nobody has both secrets of a client: k - 2 give two shares, the others one
            assert threshold(m, k) <= m < 2 * threshold(m, k) - (k - 2)


@settings(max_examples=30)
@given(st.dictionaries(st.text("abcdef", min_size=1), st.sets(st.integers(0, 30)), min_size=1, max_size=6))
def test_an_atom_has_exactly_its_holders(held: dict[str, set[int]]) -> None:
    found = atoms(31, {id: np.array(sorted(one), dtype=np.int64) for id, one in held.items()})
    of = {place: set(one.holders) for one in found for place in one.places.tolist()}
    for place in range(31):
        assert of.get(place, set()) == {id for id, one in held.items() if place in one}
    assert len({one.holders for one in found}) == len(found) < 2 ** len(held)


def test_a_change_is_placed_entry_by_entry() -> None:
    """q_proj's B of a block with the second KV group: rows 2 and 3 of four, two rank rows each."""
    part = Coverage(SHAPE, (1,), ((1,),), ((0, 5),))
    grid = grid_of(session(targets=["q_proj"]), SHAPE)
    assert grid.layout.spans["layers.1.self_attn.q_proj.B"] == slice(8, 16)
    assert grid.places(part, 2).tolist() == [12, 13, 14, 15]
    assert grid.places(part, 1).tolist() == [12, 14]  # the first rank row only
    assert grid.rows[8:16].tolist() == [2, 3] * 4
    assert Structure.of(part, 1).coverage(SHAPE) == part
