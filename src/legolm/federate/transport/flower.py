"""The Flower simulation runtime (message API): one virtual node a client, a bounded number of actors at once."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts actors at nice 15: beside any other work they would get next to nothing of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Actors work in threads, and glibc gives each a heap of its own that fills with holes: a quarter more memory.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from legolm.config import RunConfig
from legolm.federate.client import flower_app
from legolm.federate.transport.engine import Body, Reply, Request, late
from legolm.runs import RunDir

POLL_S = 0.1
IN_FLIGHT = 4
"""Requests under way for each actor, at least: enough that none waits."""
MOST_IN_FLIGHT, IN_FLIGHT_BYTES = 16, 64 << 20
"""For each actor, at most, and bytes of all beyond the least: the server's memory must not grow with clients. Nor must
its time: Flower looks at every request under way for every node in turn, so few at once make its turns short, but each
turn ends in a pause, so very few wait for it."""
OBJECT_STORE_BYTES = 256 << 20
UNASKED = -1
"""Index of a reply to no request."""


def run_flower(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """Run `body` as a Flower ServerApp; its requests are answered by ClientApps in at most `actors` processes."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = _wait_for_nodes(grid, len(config.clients))
        node_of = {client.id: node for client, node in zip(config.clients, nodes, strict=True)}

        def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            return _exchange(grid, node_of, actors, requests, deadline_s)

        body(exchange)

    threads = config.federation.threads
    run_simulation(
        server_app=server,
        client_app=flower_app(run.path.resolve()),
        num_supernodes=len(config.clients),
        backend_config={
            "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
            # Ray would start an actor for each core it finds and take a third of the memory for its store.
            "init_args": {
                "num_cpus": actors * threads,
                "object_store_memory": OBJECT_STORE_BYTES,
                "log_to_driver": False,
                "logging_level": logging.ERROR,
                "_node_ip_address": "127.0.0.1",
            },
        },
    )


def _exchange(
    grid: Grid, node_of: Mapping[str, int], actors: int, requests: Iterable[Request], deadline_s: float | None
) -> Iterator[Reply]:
    """Push requests, a few for each of `actors` and more while they are small, and give replies as they come.

    A client that crashed or cannot be reached gives an error, not an end. A reply that comes again has its index again,
    and one to nothing that was asked `UNASKED`: who asks names and drops them.
    """
    queue = enumerate(requests)
    began = time.monotonic()
    waiting: dict[str, tuple[int, int]] = {}  # index and bytes by message
    asked: dict[str, int] = {}  # index by message, of all

    def room() -> bool:
        small = len(waiting) < MOST_IN_FLIGHT * actors and sum(n for _, n in waiting.values()) < IN_FLIGHT_BYTES
        return small or len(waiting) < IN_FLIGHT * actors

    while True:
        while room():
            index, request = next(queue, (-1, None))
            if request is None:
                break
            content = RecordDict({"request": ConfigRecord({"content": request.content})})
            # The client `llm`, everyone's data at one place, has no node: any may answer.
            node = node_of.get(request.client, min(node_of.values()))
            sent = list(grid.push_messages([Message(content, node, MessageType.TRAIN)]))
            if not sent:
                yield Reply(index, error="its node cannot be reached")
            for message_id in sent:
                waiting[message_id], asked[message_id] = (index, len(request.content)), index
        if not waiting:
            return
        found = list(grid.pull_messages(list(waiting)))
        for reply in found:
            message_id = reply.metadata.reply_to_message_id
            waiting.pop(message_id, None)
            yield _read(asked.get(message_id, UNASKED), reply)
        if deadline_s is not None and time.monotonic() - began > deadline_s:
            for index in [*(index for index, _ in waiting.values()), *(index for index, _ in queue)]:
                yield Reply(index, error=late(deadline_s))
            return
        if not found:
            time.sleep(POLL_S)


def _read(index: int, reply: Message) -> Reply:
    """What came, whatever it holds: a client may send anything."""
    if reply.has_error():
        lines = (reply.error.reason or "").strip().splitlines()
        return Reply(index, error=lines[-1] if lines else "the client crashed")
    record = reply.content.config_records.get("reply", ConfigRecord())
    content, error = record.get("content"), record.get("error")
    if isinstance(content, bytes) and error is None:
        return Reply(index, content)
    return Reply(index, error=str(error or "its message has no reply in it"))


def _wait_for_nodes(grid: Grid, count: int) -> list[int]:
    while len(nodes := sorted(grid.get_node_ids())) < count:
        time.sleep(POLL_S)
    return nodes
