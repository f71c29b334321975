"""Transport: who carries requests to clients and replies back. The rounds themselves are in `pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from legolm.federate.transport.deployment import Asking, Those
from legolm.federate.transport.engine import Body, Engine, Exchange, Reply, Request, check_engine, counted

if TYPE_CHECKING:
    from legolm.config import RunConfig

from legolm.federate.transport.local import run_local
from legolm.federate.transport.superlink import Flower

__all__ = [
    "Asking",
    "Body",
    "Engine",
    "Exchange",
    "Flower",
    "Reply",
    "Request",
    "Those",
    "check_engine",
    "counted",
    "engine_for",
    "run_local",
]


def engine_for(config: RunConfig) -> Engine:
    """The configured engine. Raises `LegolmError` where it cannot work on this machine."""
    if config.federation.engine == "local":
        from legolm.federate.transport.local import run_local

        return run_local
    if config.federation.engine == "deployment":
        from legolm.federate.transport.deployment import run_deployment

        return run_deployment
    check_engine(config)
    from legolm.federate.transport.flower import run_flower

    return run_flower
