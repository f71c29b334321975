"""`devices.json`: which block each device got that said itself what it can hold (`block: auto`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from legolm.config import AUTO, Profile, RunConfig
from legolm.runs.records import Record

DEVICES = "devices.json"


class Placed(Record):
    """One device: its block, None where none fits, and why; what it said of itself, if it did.

    `memory_mb` and `disk_mb` are in MB (1e6 bytes), `tokens_per_second` is what its measured speed makes of the block.
    """

    block: str | None
    reason: str = ""
    memory_mb: float | None = None
    disk_mb: float | None = None
    tokens_per_second: float | None = None


class Devices(Record):
    """By client."""

    schema_number: Literal[2] = 2
    devices: dict[str, Placed]


def placed(config: RunConfig, devices: Mapping[str, Placed]) -> RunConfig:
    """The config with these devices' blocks and memory in it, and without those that no block fits."""
    clients = []
    for one in config.clients:
        found = devices.get(one.id) if one.block == AUTO else None
        if found is None:
            clients.append(one)
        elif found.block is not None:
            profile = None if found.memory_mb is None else Profile(memory_mb=found.memory_mb)
            clients.append(one.model_copy(update={"block": found.block, "profile": profile}))
    if clients == config.clients:
        return config
    least = min(config.federation.min_replies, len(clients))
    federation = config.federation.model_copy(update={"min_replies": least})
    return config.model_copy(update={"clients": clients, "federation": federation})
