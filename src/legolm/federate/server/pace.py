"""Asynchronous rounds: who is asked in which round, who is waited for, and how old what comes is.

A round is over with `federation.buffer` updates. Who is still training stays at its request, which is made again in
the same bytes in the rounds that follow until it is answered: a device that has the answer does not train again. The
request's round is the tag of the update. In a simulation, where one client trains after the other, clients have seeded
speeds, and the first to end are those whose time is up first: every engine gives the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from legolm.adapter import Change
from legolm.aggregate import EntryWeight, discounted, moved
from legolm.block import Coverage
from legolm.config import RunConfig
from legolm.federate.server.members import Members
from legolm.runs import RoundRecord
from legolm.system import derive_seed


def asked(config: RunConfig, rounds: Sequence[RoundRecord], number: int, drawn: Sequence[str]) -> dict[str, int]:
    """The round in which each client of round `number` was asked: now, or earlier and it has not answered yet.

    `rounds` are those before. In the order of the config.
    """
    waiting = rounds[-1].waiting if rounds else {}
    there = {client.id for client in config.clients if client.there(number)}
    now = {id: number for id in drawn} | {id: tag for id, tag in waiting.items() if id in there}
    order = [client.id for client in config.clients if client.id in now]
    return {id: now[id] for id in order or drawn}


def first_to_end(config: RunConfig, rounds: Iterable[RoundRecord], asked: Mapping[str, int]) -> list[str]:
    """Of a simulation: the clients of `asked` that end first, as many as the buffer takes."""
    ends = [0.0]  # of each round, in the time of the simulation
    for one in rounds:
        if one.round > 0:
            took = [ends[one.tags.get(id, one.round) - 1] + _pace(config.seed, id) for id in one.accepted]
            ends.append(max([ends[-1], *took]))
    ended = {id: ends[tag - 1] + _pace(config.seed, id) for id, tag in asked.items()}
    first = sorted(asked, key=lambda id: ended[id])[: config.federation.buffer]
    return [id for id in asked if id in first]


@lru_cache(maxsize=1 << 16)
def _pace(seed: int, client: str) -> float:
    """Time that a simulated client trains a round: log-normal, so that some are many times as slow as others."""
    return random.Random(derive_seed(seed, "pace", client)).lognormvariate(0.0, 1.0)


class Ages:
    """How old each entry of a change is that was asked in an earlier round; `rounds` are the run's so far."""

    def __init__(self, config: RunConfig, members: Members, rounds: Iterable[RoundRecord]) -> None:
        self._config, self._members = config, members
        self._rounds = {one.round: one for one in rounds}
        self._trains: dict[int, Mapping[str, Coverage]] = {}
        self._moved: dict[int, EntryWeight] = {}

    def coverage(self, client: str, tag: int) -> Coverage:
        """What a change covers that was asked in round `tag`."""
        if tag not in self._trains:
            self._trains[tag] = self._members.at(tag).trains
        return self._trains[tag][client]

    def discounted(self, client: str, tag: int, number: int, change: Change) -> Change:
        """What counts of it in round `number`."""
        return discounted(change, self.coverage(client, tag), [self._of(between) for between in range(tag, number)])

    def _of(self, number: int) -> EntryWeight:
        if number not in self._moved:
            one, rank = self._rounds[number], self._members.rank
            added = [(self.coverage(id, one.tags.get(id, number)), rank[id]) for id in one.accepted]
            self._moved[number] = moved(self._members.llm.coverage.shape, self._config.lora.rank, added)
        return self._moved[number]
