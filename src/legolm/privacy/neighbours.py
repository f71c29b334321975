"""Who has masks and shares in common with whom: all holders of an atom, or where they are many those near on a ring.

The ring is that of J. Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead (CCS 2020; ePrint
2020/704): a Harary graph over the holders in an order that nobody planned. Each has the `reach` before it and the
`reach` behind it for neighbours.

**One sum, or none.** Honest survivors whose masks do not connect them to each other would be several sums. So a client
gives shares of an atom only where at least `alive` of any `reach` in a row are on the list of survivors, and `alive` is
above the number of hostile holders that can be there. Each such row has an honest survivor, therefore; between two that
follow each other are fewer than `reach` others, so they are neighbours, and all honest survivors are one piece. Whom a
server leaves out, in whatever order, changes nothing of that: no probability is in it for as many hostile holders as
`colluders`, whose places may be the worst.

**Tails**, exactly, by counting subsets. As a margin above `colluders`, one in `HOSTILE` holders may be hostile at a
place of chance, and no row and no neighbourhood has too many of them (up to 2^-40 in all). A third of the holders may
go, by chance, and every row has still `alive` survivors and every secret enough shares (up to 2^-20 in all, each).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from legolm.privacy.atoms import threshold

HOSTILE = 10
"""One of so many holders may be hostile beyond what is assumed, at a place of chance."""
SAFE, WORKS = 40, 20
"""Bits: the chances that hostile holders are too near each other, and that those who went are."""


@dataclass(frozen=True)
class Near:
    """Neighbours to each side, and how many survivors any `reach` in a row must have."""

    reach: int
    alive: int


@lru_cache(maxsize=1024)
def near(holders: int, k: int) -> Near | None:
    """The nearest neighbours that suffice on an atom that opens with k; None where they are not the fewer."""
    for reach in range(k - 1, (holders // 2 - 1) // 2 + 1):
        if alive := _alive(holders, reach, k):
            return Near(reach, alive)
    return None


def _alive(holders: int, reach: int, k: int) -> int:
    """Survivors that any `reach` in a row must have and will have; 0 where it is too few to rely on."""
    hostile = max(min(k - 2, reach), reach - fewest(holders, holders - holders // HOSTILE, reach, SAFE))
    if fewest(holders, holders - _gone(holders), reach, WORKS) <= hostile:
        return 0
    others = 2 * reach
    spies = others - fewest(holders - 1, holders - 1 - holders // HOSTILE, others, SAFE)
    return hostile + 1 if opens(others, holders, k) > spies else 0


@lru_cache(maxsize=4096)
def opens(others: int, holders: int, k: int) -> int:
    """How many shares give a secret that its owner shared with so many of the other holders, and kept one of itself."""
    if others == holders - 1:
        return threshold(holders, k)
    return max(fewest(holders - 1, holders - 1 - _gone(holders), others, WORKS), k - 1)


def _gone(holders: int) -> int:
    return -(-holders // 3) - 1


def fewest(total: int, good: int, drawn: int, bits: int) -> int:
    """So many good ones at least are among `drawn` of `total`, in each of `total` such draws, but for a chance of
    2^-bits: the tail of the hypergeometric distribution in whole numbers."""
    bad = total - good
    found = max(0, drawn - bad)
    subsets, left = comb(good, found) * comb(bad, drawn - found), comb(total, drawn) // (total << bits)
    while subsets <= left:
        left -= subsets
        subsets = subsets * (good - found) * (drawn - found) // ((found + 1) * (bad - drawn + found + 1))
        found += 1
    return found


class Ring:
    """The holders of an atom in their order; `near` is None where all are neighbours."""

    def __init__(self, order: Sequence[str], near: Near | None) -> None:
        self._order, self._near = order, near
        self._places = {id: place for place, id in enumerate(order)}

    def __contains__(self, client: str) -> bool:
        return client in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def of(self, client: str) -> list[str]:
        """A holder's neighbours, and itself."""
        if self._near is None:
            return list(self._order)
        at, reach = self._places[client], self._near.reach
        return [self._order[place % len(self._order)] for place in range(at - reach, at + reach + 1)]

    def adjacent(self, one: str, other: str) -> bool:
        """Whether both hold the atom and are neighbours."""
        if one not in self._places or other not in self._places:
            return False
        apart = abs(self._places[one] - self._places[other])
        return self._near is None or min(apart, len(self._order) - apart) <= self._near.reach

    def whole(self, survivors: Collection[str]) -> bool:
        """Whether any `reach` in a row have enough survivors, so that the honest ones are one piece."""
        if self._near is None:
            return True
        there = np.array([id in survivors for id in self._order])
        sums = np.concatenate([[0], np.cumsum(np.concatenate([there, there[: self._near.reach - 1]]))])
        return bool((sums[self._near.reach :] - sums[: -self._near.reach]).min() >= self._near.alive)


def ring(holders: Sequence[str], turn: Mapping[str, bytes], k: int) -> Ring:
    """Of an atom that opens with k; `turn` orders the clients."""
    found = near(len(holders), k)
    return Ring(holders if found is None else sorted(holders, key=turn.__getitem__), found)
