"""Which questions are like a client's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.data import Familiar, Seen, Tokens
from legolm.data.familiar import KEPT


def asked(*ids: int) -> Tokens:
    """A prompt of these tokens, and an answer of token 9."""
    return Tokens(ids=(*ids, 9), answer=len(ids))


OWN, PUBLIC = [asked(1, 2), asked(1, 3, 3)], [asked(4, 2), asked(4, 5), asked(4, 2), asked(4, 3)]


def test_the_ratio_by_hand() -> None:
    """Token 1 is in both own prompts and no public one, of which there are four: ln 1 - ln 1/8."""
    seen = Seen.of(PUBLIC)
    assert (seen.prompts, seen.tokens.tolist(), seen.counts.tolist()) == (4, [2, 3, 4, 5], [2, 1, 4, 1])
    found = Familiar.of(OWN, seen)
    wanted = {1: math.log(8), 2: 0, 3: math.log(2), 4: -math.log(8), 5: -math.log(2)}
    assert found.gains == pytest.approx(wanted)  # an answer's tokens have no say
    assert found.score(asked(1, 1, 3, 7)) == pytest.approx(math.log(16))
    # By the other one alone: 1 is in all of it, and what is in this one only is in none, half of a public prompt.
    assert found.least == pytest.approx(min(math.log(8) + math.log(1 / 8 / (1 / 2)), math.log(8) + math.log(1 / 2)))
    assert found.knows(asked(1, 7)) and not found.knows(asked(5, 2)) and not found.knows(asked(1, 4))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=2, max_size=30))
def test_the_line_is_where_the_others_alone_would_draw_it(own: list[list[int]]) -> None:
    rows, seen = [asked(*ids) for ids in own], Seen.of(PUBLIC)
    unseen, theirs = 1 / (2 * max(len(rows), 4)), seen.shares()
    scores = []
    for place in range(len(rows)):
        others = [set(ids) for at, ids in enumerate(own) if at != place]
        shares = {id: sum(id in one for one in others) / len(others) for id in set(own[place])}
        scores.append(sum(math.log(max(s, unseen)) - math.log(theirs.get(id, unseen)) for id, s in shares.items()))
    found = Familiar.of(rows, seen)
    assert found.least == pytest.approx(sorted(scores)[math.floor((1 - KEPT) * (len(rows) - 1))])
    assert sum(map(found.knows, rows)) >= KEPT * len(rows) - 1


def test_it_is_kept_as_it_was() -> None:
    found = Familiar.of(OWN, Seen.of(PUBLIC))
    assert Familiar.read(found.tensors()) == found
    with pytest.raises(ValueError, match="no record"):
        Familiar.read({"tokens": torch.zeros(2), "gains": torch.zeros(3), "least": torch.zeros(1)})
    for own, public in ((OWN[:1], PUBLIC), (OWN, [])):
        with pytest.raises(ValueError, match="too few"):
            Familiar.of(own, Seen.of(public))
