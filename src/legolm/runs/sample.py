"""On whose data a client's block is scored beside its own."""

from __future__ import annotations

import random

from legolm.config import RunConfig
from legolm.system import derive_seed

ALL_UP_TO = 16
"""Clients up to which everyone's test data are asked: beyond, records and scoring would grow with their square."""
SAMPLE = 8


def others_of(config: RunConfig, client: str) -> list[str]:
    """The other clients whose test data the block of `client` is scored on, in the run's order; fixed by the seed.

    All of them, or `evaluate.others`; `SAMPLE` of more than `ALL_UP_TO` clients if that is not given. Nobody where each
    may score its own data only.
    """
    rest = [one.id for one in config.clients if one.id != client]
    if config.evaluate.scores == "own":
        return []
    most = config.evaluate.others
    if most is None:
        most = len(rest) if len(config.clients) <= ALL_UP_TO else SAMPLE
    drawn = set(random.Random(derive_seed(config.seed, "others", client)).sample(rest, min(most, len(rest))))
    return [id for id in rest if id in drawn]
