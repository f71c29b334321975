"""Atoms: the coordinates of an update that have one and the same set of holders.

Each is an ordinary secure sum of its holders, who all have it whole; blocks of any shapes are cut into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Atom:
    """Who holds it, in order, and which coordinates it is: int64, ascending."""

    holders: tuple[str, ...]
    places: np.ndarray

    @property
    def name(self) -> bytes:
        """Another one for other holders: what its masks are made for."""
        return "\n".join(self.holders).encode()


def atoms(total: int, held: Mapping[str, np.ndarray]) -> list[Atom]:
    """The atoms of coordinates below `total`, by what each client holds (int64 indices); those that nobody holds are in
    none. The order is that of their holders' names, and does not depend on the mapping's."""
    alike: dict[int, list[str]] = {}  # clients are many, and what they hold is few
    for client in sorted(held):
        alike.setdefault(id(held[client]), []).append(client)
    labels, sets = np.zeros(total, dtype=np.int64), [tuple[str, ...]()]
    for clients in alike.values():
        has = np.zeros(total, dtype=np.int64)
        has[held[clients[0]]] = 1
        both = 2 * labels + has
        there = np.bincount(both, minlength=2 * len(sets)) > 0
        number = np.cumsum(there) - 1
        sets = [sets[at // 2] + (tuple(clients) if at % 2 else ()) for at in np.flatnonzero(there)]
        labels = number[both]
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(sets)))
    parts = np.split(order, ends[:-1])
    found = [Atom(tuple(sorted(one)), part) for one, part in zip(sets, parts, strict=True) if one and len(part)]
    return sorted(found, key=lambda one: one.holders)


def threshold(holders: int, k: int) -> int:
    """How many of m shares open a secret: ⌊2m/3⌋ + 1, so that a third may go; and more than half of m and c together.

    c = k - 2 colluders give two shares each, of a client's key and of its seed, and each of the others gives one of
    them: that is m + c in all, too few for both.
    """
    return max(2 * holders // 3, (holders + k - 2) // 2) + 1
