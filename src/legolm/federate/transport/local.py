"""All clients in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch

from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.client import ClientRuntime, simulated
from legolm.federate.transport.engine import Body, Reply, Request, forgetting, late
from legolm.runs import RunDir


def run_local(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """Answer each request when it is asked for; `actors` does not matter here."""
    threads = torch.get_num_threads()
    runtime = ClientRuntime(simulated(run))

    def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        began = time.monotonic()
        for index, request in enumerate(requests):
            reply = Reply(index)
            if deadline_s is None or time.monotonic() - began < deadline_s:
                try:
                    reply = Reply(index, runtime.answer(request.content))
                except LegolmError as error:
                    reply = Reply(index, error=str(error))
            if deadline_s is not None and time.monotonic() - began > deadline_s:
                reply = Reply(index, error=late(deadline_s))
            yield reply

    try:
        with forgetting(run):
            body(exchange)
    finally:
        torch.set_num_threads(threads)
