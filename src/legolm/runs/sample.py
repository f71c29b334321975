"""On whose data a client's block is scored beside its own."""

from __future__ import annotations

import random

from legolm.config import RunConfig
from legolm.system import derive_seed

ALL_UP_TO = 16
"""Clients up to which everyone's test data are asked: beyond, records and scoring would grow with their square."""
SAMPLE = 8


def others_of(config: RunConfig) -> dict[str, list[str]]:
    """By client the others whose test data its block is scored on, in the run's order; fixed by the seed.

    All of them, or `evaluate.others`; `SAMPLE` of more than `ALL_UP_TO` clients if that is not given. Nobody where each
    may score its own data only.
    """
    clients, most = [one.id for one in config.clients], config.evaluate.others
    if config.evaluate.scores == "own":
        return {id: [] for id in clients}
    if most is None:
        most = len(clients) if len(clients) <= ALL_UP_TO else SAMPLE
    found, rest = {}, range(len(clients) - 1)  # places among the others: a list of them each would be the square
    for own, id in enumerate(clients):
        drawn = random.Random(derive_seed(config.seed, "others", id)).sample(rest, min(most, len(rest)))
        found[id] = [clients[place + (place >= own)] for place in sorted(drawn)]
    return found
