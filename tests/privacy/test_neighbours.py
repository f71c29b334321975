"""Who shares masks and secrets with whom: tails by hand, one piece whatever a server leaves out, sums over a ring."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import ABOUT, SHAPE, Sum, nothing, secret, session

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.privacy import SecureClient, neighbours
from legolm.privacy.masks import context
from legolm.privacy.neighbours import Near, Ring, fewest, near, opens

FULL = Coverage.full(SHAPE)
PART = Coverage(SHAPE, (0,), ((0,),), ((0, 2, 3, 4),))


def test_tails_by_hand() -> None:
    """Of ten pairs out of three good and two bad one has no good one: in five draws that is a chance of a half."""
    assert [fewest(5, 3, 2, bits) for bits in (0, 1, 2)] == [1, 1, 0]
    assert fewest(5, 3, 4, 99) == 2  # there are but two bad ones
    for total, good, drawn, bits in ((7, 4, 3, 0), (8, 3, 4, 1), (9, 6, 5, 2), (9, 9, 4, 3), (6, 0, 2, 0)):
        pairs = [sum(one < good for one in some) for some in combinations(range(total), drawn)]
        fitting = [x for x in range(drawn + 1) if sum(has < x for has in pairs) * total * 2**bits <= len(pairs)]
        assert fewest(total, good, drawn, bits) == max(fitting)


def tail(total: int, of: int, drawn: int, least: int) -> float:
    """The chance of `least` or more of these, each term by itself."""
    terms = (comb(of, x) * comb(total - of, drawn - x) for x in range(least, min(of, drawn) + 1))
    return sum(terms) / comb(total, drawn)


def test_how_many_neighbours() -> None:
    assert not any(near(holders, 3) for holders in range(3, 258))  # all are everybody's
    assert [near(holders, 3) for holders in (258, 1000, 10_000)] == [Near(64, 24), Near(96, 37), Near(119, 46)]
    assert [opens(2 * reach, holders, 3) for reach, holders in ((64, 258), (96, 1000))] == [64, 92]
    assert near(1000, 102) == Near(207, 101)  # a hundred of a thousand assumed, wherever they are
    assert near(1000, 202) is None
    assert [opens(m - 1, m, 3) for m in (3, 4, 6, 8, 100)] == [3, 3, 5, 6, 67]  # of all, as ever
    for holders in (258, 420, 1000, 3000):
        found = near(holders, 3)
        assert found is not None
        gone, hostile = -(-holders // 3) - 1, holders // 10
        assert holders * tail(holders, hostile, found.reach, found.alive) < 2**-40
        assert holders * tail(holders, gone, found.reach, found.reach - found.alive + 1) < 2**-20
        for peers in (holders, holders + 40, 4 * holders):  # and so it is of keys, which more may have a share of
            for others in (2 * found.reach, 3 * found.reach):
                assert peers * tail(peers, peers // 10, others, opens(others, peers, 3)) < 2**-40


@settings(max_examples=100)
@given(st.integers(8, 40), st.integers(1, 6), st.integers(1, 4), st.data())
def test_honest_survivors_are_one_piece_whoever_is_left_out(
    holders: int, reach: int, colluders: int, data: st.DataObject
) -> None:
    ids = [f"c{number}" for number in range(holders)]
    found = Ring(ids, Near(min(reach, (holders - 1) // 2), colluders + 1))
    hostile = data.draw(st.sets(st.sampled_from(ids), max_size=colluders))
    survivors = set(ids) - data.draw(st.sets(st.sampled_from(ids), max_size=holders // 3))
    if not found.whole(survivors):
        return
    honest = survivors - hostile
    piece, left = set[str](), [min(honest)]
    while left:
        one = left.pop()
        piece.add(one)
        left += honest.intersection(found.of(one)) - piece
    assert piece == honest


def test_a_ring_by_hand() -> None:
    found = Ring("abcdefgh", Near(2, 1))
    assert found.of("a") == ["g", "h", "a", "b", "c"]
    assert found.adjacent("h", "b")
    assert not found.adjacent("h", "c")
    assert not found.adjacent("a", "z")
    assert found.whole("acegh")
    assert not found.whole("abcdg")  # e and f
    assert not found.whole("bcdefg")  # h and a
    everybody = Ring("abc", None)
    assert everybody.of("a") == ["a", "b", "c"]
    assert everybody.whole("")


def test_a_third_may_go_by_chance() -> None:
    ids, draws = [f"c{number}" for number in range(300)], np.random.default_rng(0)
    found = Ring(ids, near(300, 3))
    assert all(found.whole(set(draws.choice(ids, 201, replace=False))) for _ in range(50))
    assert not found.whole(ids[:200])  # of one place


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Near:
    """A ring where a real one would have hundreds of holders."""
    found = Near(reach=3, alive=2)
    monkeypatch.setattr(neighbours, "near", lambda holders, k: found if holders >= 12 else None)
    return found


@pytest.mark.parametrize("phase", ["keys", "shares", "upload", "confirm", "unmask"])
def test_sums_over_a_ring(phase: str, small: Near) -> None:
    """Eight of sixteen hold all, and the others some: one atom is a ring of sixteen, the other one has all pairs."""
    ids = [f"c{number:02d}" for number in range(16)]
    one = Sum({id: FULL if number % 2 else PART for number, id in enumerate(ids)}, {"c04": phase})
    sizes: dict[str, int] = {}
    shares = one.server.shares
    one.server.shares = lambda id, sealed: (sizes.update({id: len(sealed)}), shares(id, sealed))[1]  # type: ignore
    opened, closed = one.run(np.random.default_rng(0))
    assert not closed
    assert {len(found.atom.holders) for found in opened} == {16 - (phase == "keys"), 8}
    assert all((found.total == one.plain(found)).all() for found in opened)
    assert {sizes[id] for id in sizes if int(id[1:]) % 2 == 0} == {6}
    assert all(7 <= sizes[id] <= 13 for id in sizes if int(id[1:]) % 2)  # and the seven who hold all


def uploaded(
    ids: list[str], gone: Callable[[list[str]], list[str]]
) -> tuple[Sum, dict[str, SecureClient], dict[str, np.ndarray]]:
    """All but some have sent ones, and signed who did; `gone` gets the ring's order from the first on."""
    one = Sum(dict.fromkeys(ids, FULL))
    clients = {id: SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 1) for id in ids}
    server, words = one.server, {}
    for id in ids:
        server.advert(id, clients[id].kept.own)
    server.close_keys()
    for id in ids:
        server.shares(id, clients[id].shares(server.adverts, server.structures, one.identities))
    without = gone(list(server.cohort.ring(server.cohort.atoms[0])))
    for id in (id for id in ids if id not in without):
        received = np.zeros(len(server.cohort.places(id)), dtype=np.float32)
        opening = clients[id].opening(server.cohort, server.there, ABOUT, received, nothing(server.cohort))
        sent = clients[id].upload(server.cohort, server.inbox(id), opening, np.ones(len(received), dtype=np.int32))
        server.upload(id, *sent)
        words[id] = sent[0]
    for id in server.survivors:
        server.confirm(id, clients[id].confirm(server.survivors))
    return one, clients, words


def test_no_one_opens_where_the_ring_would_be_in_pieces(small: Near) -> None:
    """Nine of twelve must sign. The server leaves out two near each other: a row of three then has one survivor, who
    may be the colluder; and honest ones are on both sides of it."""
    for apart, whole in ((1, False), (2, False), (3, True)):
        one, clients, _ = uploaded(
            [f"c{number:02d}" for number in range(12)], lambda order, apart=apart: [order[0], order[apart]]
        )
        server = one.server
        client = clients[server.survivors[0]]
        if whole:
            assert client.unmask(server.cohort, server.signatures)
            continue
        with pytest.raises(LegolmError, match="too few of the survivors signed"):
            client.unmask(server.cohort, server.signatures)
        (atom,) = server.cohort.atoms
        _, closed = server.finish(ABOUT, np.zeros(len(atom.places), dtype=np.float32))
        assert closed == {atom.holders: "of those who are neighbours on it too many did not send it"}


def test_what_a_server_would_have_of_pieces(small: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not asked whether all is one piece: the sum of five of 24 by themselves, between two gaps of three."""
    monkeypatch.setattr(Ring, "whole", lambda *_: True)
    orders: list[list[str]] = []

    def gaps(order: list[str]) -> list[str]:
        orders.append(order)
        return order[:3] + order[8:11]

    one, clients, words = uploaded([f"c{number:02d}" for number in range(24)], gaps)
    server = one.server
    for id in server.giving:
        server.unmask(id, clients[id].unmask(server.cohort, server.signatures))
    (atom,), few = server.cohort.atoms, orders[0][3:8]
    about = context(server.cohort, server.there, ABOUT, nothing(server.cohort))
    server._words = sum(words[id] for id in few)
    assert (server._open(atom, few, about, {}) == 5).all()


def test_all_hold_shares_and_masks_of_their_neighbours_only(small: Near) -> None:
    one = Sum(dict.fromkeys((f"c{number:02d}" for number in range(12)), FULL), session=session(k=4))
    opened, _ = one.run(np.random.default_rng(0))
    assert (opened[0].total == one.plain(opened[0])).all()
    cohort = one.server.cohort
    for id in cohort.adverts:
        group, least = cohort.sharing(id, None)
        assert len(group) == 7
        assert least == 3  # more than both colluders
        assert set(one.server.inbox(id)) == set(group) - {id}
        assert all(id in cohort.neighbours(other) for other in group)
