"""Which client gets which block, and how much memory fine-tuning it takes."""

from __future__ import annotations

from collections.abc import Mapping

from legolm.config import ClientConfig, RunConfig
from legolm.errors import LegolmError


def assign(config: RunConfig, needs: Mapping[str, int], parameters: Mapping[str, int]) -> dict[str, str]:
    """Block name of each client: as configured (of several the first), or the largest that its profile can hold.

    `needs` is the training memory (bytes) of each block. Raises `LegolmError` when no block fits a profile.
    """
    return {client.id: _block_of(client, needs, parameters) for client in config.clients}


def _block_of(client: ClientConfig, needs: Mapping[str, int], parameters: Mapping[str, int]) -> str:
    if client.profile is None:
        return client.block or (client.blocks or [""])[0]
    budget = client.profile.memory_mb * 1e6
    fitting = [name for name, need in needs.items() if need <= budget]
    if not fitting:
        least = min(needs.values()) / 1e6
        raise LegolmError(
            f"clients: {client.id!r} has {client.profile.memory_mb:.0f} MB; the smallest block needs {least:.0f} MB; "
            "add a smaller block, or lower train.micro_batch_tokens or train.max_length"
        )
    return max(fitting, key=lambda name: parameters[name])
