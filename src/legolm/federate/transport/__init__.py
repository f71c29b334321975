"""Transport: who carries requests to clients and replies back. The rounds themselves are in `pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from legolm.errors import LegolmError
from legolm.federate.transport.deployment import Asking, Those
from legolm.federate.transport.engine import Body, Engine, Exchange, Reply, Request, counted

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
    "counted",
    "engine_for",
    "run_local",
]


def engine_for(config: RunConfig) -> Engine:
    """The configured engine. Raises `LegolmError` when Flower's simulation is not installed."""
    if config.federation.engine == "local":
        from legolm.federate.transport.local import run_local

        return run_local
    if config.federation.engine == "deployment":
        from legolm.federate.transport.deployment import run_deployment

        return run_deployment
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise LegolmError(
            "federation.engine 'flower': its simulation is not installed; "
            "run: pip install 'legolm[simulation]', or set federation.engine=local"
        )
    from legolm.federate.transport.flower import run_flower

    return run_flower
