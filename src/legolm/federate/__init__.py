"""Transport: who carries requests to clients and replies back. The rounds themselves are in `pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from legolm.federate.engine import Body, Engine, Exchange, Reply, Request
from legolm.types import LegolmError

if TYPE_CHECKING:
    from legolm.config import RunConfig

__all__ = ["Body", "Engine", "Exchange", "Reply", "Request", "engine_for"]


def engine_for(config: RunConfig) -> Engine:
    """The configured engine. Raises `LegolmError` when Flower's simulation is not installed."""
    if config.federation.engine == "local":
        from legolm.federate.local import run_local

        return run_local
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise LegolmError(
            "federation.engine 'flower': its simulation is not installed; "
            "run: pip install 'legolm[simulation]', or set federation.engine=local"
        )
    from legolm.federate.flower import run_flower

    return run_flower
