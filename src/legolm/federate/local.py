"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from legolm.config import RunConfig
from legolm.federate.client import ClientRuntime
from legolm.federate.engine import Body, Reply, Request
from legolm.rundir import RunDir
from legolm.types import LegolmError


def run_local(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """Answer each request when it is asked for; `actors` does not matter here."""
    threads = torch.get_num_threads()
    runtime = ClientRuntime(run)

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        for index, request in enumerate(requests):
            try:
                yield Reply(index, runtime.answer(request.content))
            except LegolmError as error:
                yield Reply(index, error=str(error))

    try:
        body(exchange)
    finally:
        torch.set_num_threads(threads)
