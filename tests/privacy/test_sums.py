"""Secure sums over unequal blocks: exact whatever shapes and dropouts, and noise or nothing where it should be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import ABOUT, SHAPE, Sum, nothing, secret, session

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.privacy import SecureClient, Structure, withheld
from legolm.privacy.cohort import survivors_text
from legolm.privacy.primitives import sign

FULL = Coverage.full(SHAPE)
SOME = Coverage(SHAPE, (0, 1), ((0, 1),) * 2, ((0, 2, 3), (1, 2, 5)))
ONE = Coverage(SHAPE, (0,), ((0,),), ((0, 2, 3, 4),))
SIX = {"a": FULL, "b": FULL, "c": SOME, "d": SOME, "e": ONE, "f": ONE}
PHASES = ("keys", "shares", "upload", "confirm", "unmask")


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def subset(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


@st.composite
def coverages(draw: st.DrawFn) -> Coverage:
    layers = draw(subset(SHAPE.layers))
    groups = tuple(draw(subset(SHAPE.kv_groups)) for _ in layers)
    return Coverage(SHAPE, layers, groups, tuple(draw(subset(SHAPE.neurons)) for _ in layers))


def test_three_blocks_by_hand() -> None:
    """The LLM, all of whose layers one block has with half the neurons, and another block one layer."""
    one = Sum(SIX)
    opened, closed = one.run(draws())
    assert {found.survivors: len(found.total) for found in opened} == {
        # Rank 2; layer 0: q, k, v, o of one of two groups (8 rows) and gate, up, down of neurons 0, 2 and 3 (9 rows).
        tuple("abcdef"): 2 * (8 + 9),
        # The other group's 8 rows, all of layer 1's 16, and its neurons 1, 2 and 5.
        tuple("abcd"): 2 * (8 + 16 + 9),
        # Neuron 4 of layer 0.
        tuple("abef"): 2 * 3,
    }
    assert not closed
    assert all((found.total == one.plain(found)).all() for found in opened)
    # Held by a and b only: neurons 1 and 5 of layer 0, and three of layer 1.
    held = Counter(one.structures.values())
    assert withheld(one.server.cohort.grid, SHAPE, held, 3) == pytest.approx(15 / (17 + 33 + 3 + 15))
    assert withheld(one.server.cohort.grid, SHAPE, held, 5) == pytest.approx((15 + 33 + 3) / (17 + 33 + 3 + 15))


@settings(max_examples=12)
@given(st.lists(coverages(), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=3, max_size=8), st.data())
def test_sums_are_exact_whoever_goes_when(blocks: list[Coverage], of: list[int], data: st.DataObject) -> None:
    ids = [f"c{number}" for number in range(len(of))]
    clients = {id: blocks[at % len(blocks)] for id, at in zip(ids, of, strict=True)}
    ranks = {id: data.draw(st.integers(1, 2)) for id in ids}
    most = -(-len(ids) // 3) - 1
    dead = data.draw(st.sets(st.sampled_from(ids), max_size=most))
    gone = {id: data.draw(st.sampled_from(PHASES)) for id in sorted(dead)}
    one = Sum(clients, gone, session=session(frozen_side=data.draw(st.booleans())), rank=ranks)
    try:
        opened, closed = one.run(draws())
    except LegolmError as error:
        assert "it needs 3" in str(error)
        return
    for found in opened:
        assert (found.total == one.plain(found)).all()
        assert len(found.survivors) >= 3
    # Of atoms with enough holders each is one or the other.
    assert {found.atom.holders for found in opened} | set(closed) == {
        found.holders for found in one.server.cohort.atoms
    }


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("clients", [4, 6, 9])
def test_all_but_a_third_suffice(phase: str, clients: int) -> None:
    ids = [f"c{number}" for number in range(clients)]
    gone = dict.fromkeys(ids[: -(-clients // 3) - 1], phase)
    one = Sum(dict.fromkeys(ids, FULL), gone)
    opened, closed = one.run(draws())
    assert len(opened) == 1
    assert not closed
    assert (opened[0].total == one.plain(opened[0])).all()
    sent = PHASES.index(phase) > PHASES.index("upload")
    assert opened[0].survivors == tuple(ids if sent else ids[len(gone) :])


def test_one_more_and_it_stays_closed_and_the_rest_opens() -> None:
    """Of four holders of an atom two go after they sent shares; six of the other eight are left."""
    clients = dict.fromkeys("abcd", FULL) | dict.fromkeys("efgh", SOME)
    one = Sum(clients, {"a": "upload", "b": "upload"})
    opened, closed = one.run(draws())
    assert [found.survivors for found in opened] == [tuple("cdefgh")]
    assert (opened[0].total == one.plain(opened[0])).all()
    assert closed == {tuple("abcd"): "2 of its 4 holders sent it; 3 must"}
    one = Sum(clients, {"a": "unmask", "b": "unmask"})  # sent, confirmed, and gone
    opened, closed = one.run(draws())
    assert [found.survivors for found in opened] == [tuple("abcdefgh")]
    assert "the shares of the seed" in closed[tuple("abcd")]


def test_an_atom_stays_closed_that_lost_more_parts_of_the_noise_than_allowed() -> None:
    """One may go: of eight holders seven are enough, and of four three, which it needs anyway."""
    for dropouts, gone, shut in ((1, "a", ""), (1, "ae", "abcdefgh"), (0, "e", "abcdefgh")):
        clients = dict.fromkeys("abcd", FULL) | dict.fromkeys("efgh", SOME)
        one = Sum(clients, dict.fromkeys(gone, "upload"), session=session(dropouts=dropouts))
        opened, closed = one.run(draws())
        assert set(closed) == ({tuple(shut)} if shut else set())
        assert all((found.total == one.plain(found)).all() for found in opened)
        if shut:
            assert closed[tuple(shut)] == f"{8 - len(gone)} of its 8 holders sent it; {8 - dropouts} must"
    # Who goes before the shares has no part to lose.
    opened, closed = Sum(dict.fromkeys("abcdef", FULL), {"a": "shares"}, session=session(dropouts=0)).run(draws())
    assert [found.survivors for found in opened] == [tuple("bcdef")]
    assert not closed
    assert [session(dropouts=1).parts(there) for there in (3, 4, 8)] == [2, 2, 6]
    assert session(k=5, dropouts=0).parts(8) == 5  # of eight three collude


@pytest.mark.parametrize("holders", ["abcdef", "abcd", "ab"])
def test_another_model_is_refused_or_makes_noise_wherever_it_is_another(holders: str) -> None:
    """Entries of one atom, an open or a closed one, shape what is learned on all: from values without end nobody
    learns anything, and a sum of those who were told so and one other is that one's change."""
    right = Sum(SIX)
    right.run(draws())
    (atom,) = (one for one in right.server.cohort.all_atoms if "".join(one.holders) == holders)

    def poisoned(values: np.ndarray) -> np.ndarray:
        found = values.copy()
        found[atom.places] = 1e12
        return found

    with pytest.raises(LegolmError, match="b got another model than what all are told that its holders got"):
        Sum(SIX, told={"b": poisoned}).run(draws())
    away: dict[tuple[str, ...], list[float]] = {}
    for _ in range(8):  # keys are new each time, and the least atom has six entries
        one = Sum(SIX, told={"b": poisoned}, said={"b": poisoned})
        opened, _ = one.run(draws())
        assert len(opened) == 3  # b holds all of them
        for found in opened:
            away.setdefault(found.atom.holders, []).append(np.abs(found.total - one.plain(found)).mean())
    for errors in away.values():
        assert np.mean(errors) > 8_000 and min(errors) > 1_000  # uniform in ± 2^15: 16384


def test_what_is_sent_looks_like_noise() -> None:
    one = Sum(SIX)
    sent: list[np.ndarray] = []
    upload = one.server.upload
    one.server.upload = lambda id, words, hashes: (sent.append(words), upload(id, words, hashes))[1]  # type: ignore
    one.run(draws())
    words = np.concatenate(sent).astype(np.float64)
    assert abs(words.mean() / 65536 - 0.5) < 0.1
    assert words.std() / 65536 == pytest.approx(12**-0.5, rel=0.1)


def test_wide_words_for_many_holders() -> None:
    ids = [f"c{number:03d}" for number in range(258)]
    part = Coverage(SHAPE, (0,), ((0,),), ((0,),))
    one = Sum(dict.fromkeys(ids, part), session=session(targets=["up_proj"], rank=1))
    for id in ids:
        one.server.advert(id, SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 1).kept.own)
    one.server.close_keys()
    assert one.server.cohort.bits == 32


# What is refused


def begun(clients: str = "abcd", **fields: object) -> tuple[Sum, dict[str, SecureClient]]:
    """After the keys."""
    one = Sum(dict.fromkeys(clients, FULL), session=session(**fields))
    found = {id: SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 7) for id in clients}
    for id, client in found.items():
        one.server.advert(id, client.kept.own)
    one.server.close_keys()
    return one, found


def test_a_roster_whose_signatures_do_not_fit() -> None:
    one, clients = begun()
    other = one.identities | {"b": one.identities["c"]}
    with pytest.raises(LegolmError, match="signature of client b does not fit its identity in the roster"):
        clients["a"].shares(one.server.adverts, one.server.structures, other)
    with pytest.raises(LegolmError, match="client b is not in the roster"):
        clients["a"].shares(one.server.adverts, one.server.structures, {"a": one.identities["a"]})
    # Keys of another round are signed for another round.
    later = SecureClient.begin(session(round=2), "b", secret("b"), SHAPE, one.structures["b"], 7).kept.own
    with pytest.raises(LegolmError, match="signature of client b does not fit"):
        one.server.advert("b", later)
    with pytest.raises(LegolmError, match="b signed other keys or another block"):
        one.server.advert("b", clients["c"].kept.own)
    # Nor may a server tell a client that it holds something else than it signed.
    held = clients["a"].kept.own.held
    with pytest.raises(LegolmError, match="not what it signed"):
        clients["a"].shares(one.server.adverts, {held: Structure.of(SOME, 2)}, one.identities)


def test_too_few_for_k() -> None:
    with pytest.raises(LegolmError, match="4 clients are there, and it needs 5"):
        begun(k=5)
    one, clients = begun()
    few = one.server.adverts[:2]
    with pytest.raises(LegolmError, match="nothing that a holds has 3 holders of 2 clients"):
        clients["a"].shares(few, one.server.structures, one.identities)


def uploaded(clients: str = "abcd") -> tuple[Sum, dict[str, SecureClient]]:
    """All have sent their sums."""
    one, found = begun(clients)
    server = one.server
    for id in clients:
        server.shares(id, found[id].shares(server.adverts, server.structures, one.identities))
    for id in clients:
        received = np.zeros(len(server.cohort.places(id)), dtype=np.float32)
        opening = found[id].opening(server.cohort, server.there, ABOUT, received, nothing(server.cohort))
        numbers = np.ones(len(received), dtype=np.int32)
        server.upload(id, *found[id].upload(server.cohort, server.inbox(id), opening, numbers))
    return one, found


def test_what_is_passed_on_does_not_depend_on_who_came_first() -> None:
    said = []
    for order in (1, -1):
        one = Sum(SIX)
        clients = {id: SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 7) for id in SIX}
        server = one.server
        for id in list(SIX)[::order]:
            server.advert(id, clients[id].kept.own)
        server.close_keys()
        for id in list(SIX)[::order]:
            server.shares(id, clients[id].shares(server.adverts, server.structures, one.identities))
        server._commitments = {id: [] for id in SIX}
        for id in list(SIX)[::order]:
            server.confirm(id, sign(secret(id), survivors_text(server.cohort, server.there, server.survivors)))
        said.append([list(server.structures.values()), list(server.inbox("a")), list(server.signatures)])
    assert said[0] == said[1]


def test_a_client_signs_and_opens_once() -> None:
    one, clients = uploaded()
    client, server = clients["a"], one.server
    with pytest.raises(LegolmError, match="asked for unmask after upload"):
        client._step("unmask")
    with pytest.raises(LegolmError, match="a is not among the survivors"):
        client.confirm(["b", "c", "d"])
    for id in "abcd":
        server.confirm(id, clients[id].confirm(server.survivors))
    with pytest.raises(LegolmError, match="asked for confirm after confirm"):
        client.confirm(["a", "b", "c"])  # else b's seed opens now, and then d's key with it
    server.unmask("a", client.unmask(server.cohort, server.signatures))
    with pytest.raises(LegolmError, match="asked for unmask after unmask"):
        client.unmask(server.cohort, server.signatures)


def test_nothing_opens_without_the_others_signatures() -> None:
    one, clients = uploaded()
    server, client = one.server, clients["a"]
    for id in "abc":  # the server told d that others survived
        server.confirm(id, clients[id].confirm(server.survivors))
    others = clients["d"].confirm(["b", "c", "d"])
    with pytest.raises(LegolmError, match="d signed other survivors"):
        server.confirm("d", others)
    mine = server.signatures
    with pytest.raises(LegolmError, match="too few of the survivors signed"):
        client.unmask(server.cohort, {"a": mine["a"], "b": mine["b"]})
    forged = sign(secret("z"), survivors_text(server.cohort, server.there, server.survivors))
    with pytest.raises(LegolmError, match="too few of the survivors signed"):
        client.unmask(server.cohort, {"a": mine["a"], "b": mine["b"], "c": forged})
    assert len(client.unmask(server.cohort, mine)) == 4  # of four seeds, and no key


def test_a_server_with_two_lists_of_survivors_gets_no_key_and_seed_of_one_client() -> None:
    """`a` colludes, and holds with b and c what nobody else does; they are told that all sent, the others that b did
    not. With b's key of the others and its seed of these, what b sent of the small atom would be bare."""
    few, many = "abc", "defghijkl"
    one = Sum(dict.fromkeys(few, FULL) | dict.fromkeys(many, ONE))
    server, clients = one.server, {}
    for id in one.clients:
        clients[id] = SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 1)
        server.advert(id, clients[id].kept.own)
    server.close_keys()
    for id in one.clients:
        server.shares(id, clients[id].shares(server.adverts, server.structures, one.identities))
    for id in one.clients:
        received = np.zeros(len(server.cohort.places(id)), dtype=np.float32)
        opening = clients[id].opening(server.cohort, server.there, ABOUT, received, nothing(server.cohort))
        clients[id].upload(server.cohort, server.inbox(id), opening, np.ones(len(opening.order), dtype=np.int32))
    lists = {few: list(one.clients), many: [id for id in one.clients if id != "b"]}
    signed = {group: {id: clients[id].confirm(there) for id in group} for group, there in lists.items()}
    signed[many]["a"] = sign(secret("a"), survivors_text(server.cohort, server.there, lists[many]))
    assert len(clients["d"].unmask(server.cohort, signed[many])) == len(one.clients)  # b's key, and others' seeds
    with pytest.raises(LegolmError, match="too few of the survivors signed"):
        clients["c"].unmask(server.cohort, signed[few])


def test_of_the_dead_keys_and_of_the_living_seeds() -> None:
    """A share is of one or the other: all that a client gives of d, which sent nothing, is of its key."""
    one = Sum(dict.fromkeys("abcd", FULL), {"d": "upload"})
    given_shares: dict[str, list[tuple[str, object]]] = {}
    unmask = one.server.unmask

    def note(id: str, shares: list[bytes]) -> None:
        unmask(id, shares)
        given_shares[id] = list(one.server._shares[id])

    one.server.unmask = note  # type: ignore[method-assign]
    opened, _ = one.run(draws())
    assert (opened[0].total == one.plain(opened[0])).all()
    atom = tuple("abcd")
    assert given_shares == {id: [("a", atom), ("b", atom), ("c", atom), ("d", None)] for id in "abc"}


def test_a_wrong_share_closes_its_atom_and_is_named() -> None:
    one, clients = uploaded()
    server = one.server
    for id in "abcd":
        server.confirm(id, clients[id].confirm(server.survivors))
    for id in "abcd":
        shares = clients[id].unmask(server.cohort, server.signatures)
        server.unmask(id, [bytes(33), *shares[1:]] if id == "b" else shares)
    opened, closed = server.finish(ABOUT, np.zeros(server.cohort.grid.layout.total, dtype=np.float32))
    assert not opened
    assert closed == {tuple("abcd"): "the shares of the seed of a do not give it"}


def test_messages_of_other_sizes() -> None:
    one, clients = begun()
    server = one.server
    sealed = clients["a"].shares(server.adverts, server.structures, one.identities)
    for wrong in ({**sealed, "b": sealed["b"][:-1]}, {**sealed, "z": sealed["b"]}, {"b": sealed["b"]}):
        with pytest.raises(LegolmError, match="a sealed shares for others than its neighbours"):
            server.shares("a", wrong)
    one, clients = uploaded()
    with pytest.raises(LegolmError, match="a sent 3 numbers"):
        one.server.upload("a", np.zeros(3, dtype="<u2"), [])
    with pytest.raises(LegolmError, match="a sent hashes of 0 seeds"):
        one.server.upload("a", np.zeros(one.server.cohort.grid.layout.total, dtype="<u2"), [])
    with pytest.raises(LegolmError, match="a gave 0 shares"):
        for id in "abcd":
            one.server.confirm(id, clients[id].confirm(one.server.survivors))
        one.server.unmask("a", [])


def test_what_was_signed_of_other_keys_opens_nothing() -> None:
    """A device may begin a session again: signatures of the sum before, of the same list, are not of this one."""
    (before, first), (one, clients) = uploaded(), uploaded()
    assert before.session == one.session
    old = {id: first[id].confirm(list("abcd")) for id in "abcd"}
    mine = {id: clients[id].confirm(list("abcd")) for id in "abcd"}
    with pytest.raises(LegolmError, match="too few of the survivors signed"):
        clients["a"].unmask(one.server.cohort, old | {"a": mine["a"]})
    assert clients["a"].unmask(one.server.cohort, mine)


@pytest.mark.parametrize("field", ["seal_key", "mask_key"])
def test_a_key_that_agrees_with_everybody_stops_its_client_alone(field: str) -> None:
    one = Sum(SIX)
    clients = {id: SecureClient.begin(one.session, id, secret(id), SHAPE, one.structures[id], 7) for id in SIX}
    weak = clients["a"].kept.own.model_copy(update={field: bytes(32).hex()}).signed(one.session, secret("a"))
    with pytest.raises(LegolmError, match="a public key is none"):
        one.server.advert("a", weak)
    for id in set(SIX) - {"a"}:
        one.server.advert(id, clients[id].kept.own)
    one.server.close_keys()
