"""Which questions are like a client's own."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, quantiles

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.data import Familiar, Seen, Tokens


def asked(*ids: int) -> Tokens:
    """A prompt of these tokens, and an answer of token 9."""
    return Tokens(ids=(*ids, 9), answer=len(ids))


OWN, PUBLIC = [asked(1, 2), asked(1, 3, 3)], [asked(4, 2), asked(4, 5), asked(4, 2), asked(4, 3)]


def gram(*ids: int) -> int:
    """The digits of a number in a base of 64 bits, mixed once; whole numbers, of which the last 64 bits count."""
    base, bits = 0x9E3779B97F4A7C15, 1 << 64
    number = sum((id + 1) * base ** (len(ids) - 1 - place) for place, id in enumerate(ids)) % bits
    return (number ^ number >> 32) * base % bits >> 1


def test_the_ratio_by_hand() -> None:
    """Token 1 is in both own prompts and no public one, of which there are four: ln 1 - ln 1/8."""
    seen = Seen.of(PUBLIC)
    wanted = {(2,): 2, (3,): 1, (4,): 4, (5,): 1, (4, 2): 2, (4, 5): 1, (4, 3): 1}
    assert seen.prompts == 4
    assert dict(zip(seen.grams.tolist(), seen.counts.tolist(), strict=True)) == {gram(*k): n for k, n in wanted.items()}
    found = Familiar.of(OWN, seen, 0.02)
    gains = {(1,): 8, (2,): 1, (3,): 2, (4,): 1 / 8, (5,): 1 / 2, (4, 2): 1 / 4, (4, 5): 1 / 2, (4, 3): 1 / 2}
    gains |= dict.fromkeys([(1, 2), (1, 3), (3, 3), (1, 3, 3)], 4.0)
    assert found.gains == pytest.approx({gram(*k): math.log(gain) for k, gain in gains.items()})
    # An answer's tokens have no say, nor has what neither has seen; what is there twice counts once.
    assert found.score(asked(1, 7, 1)) == pytest.approx(math.log(8))
    assert found.score(asked(1, 3, 3)) == pytest.approx(math.log(8 * 2 * 4 * 4 * 4))
    # By the other one alone 1 is in all, 2 and 3 in none: 8 x (1/8) / (2/4) for the first, 8 x (1/8) / (1/4) else. Of
    # two rows 2 % is a 25th of one: below ln 2 by the twentieth of (ln 4 - ln 2) for each half.
    assert found.least == pytest.approx(math.log(2) * (1 - math.log2(25) / 20))
    assert found.knows(asked(1, 7)) and not found.knows(asked(5, 2)) and not found.knows(asked(1, 4))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=2, max_size=30), st.floats(0, 0.1))
def test_the_line_is_where_the_others_alone_would_draw_it(own: list[list[int]], away: float) -> None:
    rows, seen = [asked(*ids) for ids in own], Seen.of(PUBLIC)
    unseen, theirs = 1 / (2 * max(len(rows), 4)), seen.shares()
    scores = []
    each = [{gram(*ids[at : at + n]) for n in (1, 2, 3, 4, 5) for at in range(len(ids) - n + 1)} for ids in own]
    for place, mine in enumerate(each):
        others = [one for at, one in enumerate(each) if at != place]
        shares = {id: sum(id in one for one in others) / len(others) for id in mine}
        scores.append(sum(math.log(max(s, unseen)) - math.log(theirs.get(id, unseen)) for id, s in shares.items()))
    found = Familiar.of(rows, seen, away)
    first, _, third = quantiles(scores, n=4, method="inclusive")
    least, few = (sorted(scores)[math.floor(share * (len(rows) - 1))] for share in (away, 0.02))
    if away < 1 / len(rows):
        half = quantiles(scores, n=10, method="inclusive")[0] - quantiles(scores, n=20, method="inclusive")[0]
        least -= half * math.log2(1 / (away * len(rows))) if away else math.inf
    line = max(least, min(few, first - 3 * (third - first)))
    assert found.least == pytest.approx(line)
    let_go = max(away * len(rows), sum(score < line for score in scores))
    assert sum(map(found.knows, rows)) >= len(rows) - let_go - 1


def test_a_share_of_less_than_one_row_holds_for_rows_to_come() -> None:
    """Of 100 rows the lowest is no line for one in a thousand: one in a hundred of those to come is below it."""
    rng = random.Random(0)
    public, let_go = Seen.of([asked(*(rng.randrange(30, 60) for _ in range(6))) for _ in range(100)]), []
    for _ in range(20):
        own = [asked(*(rng.choices(range(30), range(30, 0, -1), k=6))) for _ in range(1100)]
        found = Familiar.of(own[:100], public, 0.001)
        let_go.append(fmean(not found.knows(one) for one in own[100:]))
    assert fmean(let_go) < 0.005


def test_a_row_that_is_none_of_its_own_does_not_draw_the_line() -> None:
    """With nothing to let go the least of its own questions is known, but one by mistake among them is not."""
    rng = random.Random(0)
    rows = [asked(*(rng.randrange(10) for _ in range(6))) for _ in range(101)]
    public = Seen.of([asked(*(rng.randrange(10, 20) for _ in range(6))) for _ in range(100)])
    assert all(map(Familiar.of(rows[:100], public, 0.0).knows, rows[:100]))
    stray = asked(11, 12, 13, 14, 15, 16)
    found = Familiar.of([*rows[:100], stray], public, 0.0)
    assert not found.knows(stray) and all(map(found.knows, rows))


def test_questions_that_are_mostly_one_do_not_send_the_others_away() -> None:
    """Four in five are the same to the letter, so that every other one is many quartile distances off."""
    rng = random.Random(0)
    rows = [asked(*range(8)) if i % 5 else asked(0, *(rng.randrange(8) for _ in range(7))) for i in range(100)]
    public = Seen.of([asked(*(rng.randrange(10, 20) for _ in range(8))) for _ in range(100)])
    assert sum(map(Familiar.of(rows, public, 0.0).knows, rows)) >= 98


def test_it_is_kept_as_it_was() -> None:
    seen = Seen.of(PUBLIC)
    again = Seen.unpacked(4, seen.packed())
    assert torch.equal(again.grams, seen.grams) and torch.equal(again.counts, seen.counts)
    for broken in (torch.zeros(16, dtype=torch.uint8), torch.zeros(15, dtype=torch.uint8), torch.zeros(16)):
        with pytest.raises(ValueError, match=r"no grams|below 1"):
            Seen.unpacked(1, broken)
    found = Familiar.of(OWN, seen, 0.02)
    assert Familiar.read(found.tensors()) == found
    with pytest.raises(ValueError, match="no record"):
        Familiar.read({"hashes": torch.zeros(2), "gains": torch.zeros(3), "least": torch.zeros(1)})
    for own, public in ((OWN[:1], PUBLIC), (OWN, [])):
        with pytest.raises(ValueError, match="too few"):
            Familiar.of(own, Seen.of(public), 0.02)


def test_months_of_one_task_are_told_by_both_of_their_sides() -> None:
    """Dates of digits, 10 to 15 between bars (20): an own month may be a year's or a day's end elsewhere."""
    rng = random.Random(0)

    def date(months: Sequence[int]) -> Tokens:
        year, day = [rng.randrange(10) for _ in range(4)], [rng.randrange(3), rng.randrange(10)]
        return asked(*year, 20, 0, rng.choice(months), 20, *day)

    own, public = [date((1, 2, 3)) for _ in range(200)], [date(range(1, 7)) for _ in range(200)]
    found = Familiar.of(own, Seen.of(public), 0.02)
    assert fmean(found.knows(date((1, 2, 3))) for _ in range(200)) > 0.95
    assert fmean(found.knows(date((4, 5, 6))) for _ in range(200)) < 0.15
