"""The Flower simulation runtime (message API): one virtual node a client, a bounded number of actors at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts actors at nice 15: beside any other work they would get next to nothing of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Actors work in threads, and glibc gives each a heap of its own that fills with holes: a quarter more memory.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")

import psutil
import ray
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from legolm.config import RunConfig
from legolm.errors import LegolmError, brief
from legolm.federate.client import flower_app
from legolm.federate.transport.engine import Body, Reply, Request, forgetting, late, ray_place
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
KILLED = ("ray.exceptions.Actor", "ray.exceptions.OutOfMemory")
RESTARTS = "The actor is restarting"
"""What Ray says of an actor whose process was killed, and where it is not back yet: the request has reached nobody."""


def run_flower(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """Run `body` as a Flower ServerApp; its requests are answered by ClientApps in at most `actors` processes."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # errors are raised, or come as replies
    server, threads = ServerApp(), config.federation.threads
    stopped = threading.Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = _wait_for_nodes(grid, len(config.clients))
        node_of = {client.id: node for client, node in zip(config.clients, nodes, strict=True)}

        def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            return _exchange(grid, node_of, actors, requests, deadline_s, stopped)

        body(exchange)

    def stop() -> None:
        stopped.set()  # first: what comes of the actors' end is no client's reply
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[0].startswith("ray::ClientAppActor"):
                    process.kill()

    with forgetting(run), _ray(actors * threads), _stoppable(stop):
        run_simulation(
            server_app=server,
            client_app=flower_app(run.path.resolve()),
            num_supernodes=len(config.clients),
            # Flower gives them to Ray as options of an actor, which else would answer all that waits once it is gone.
            backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0, "max_restarts": -1}},
        )


@contextmanager
def _stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `stop`, and raise `KeyboardInterrupt` at the block's end; a second one ends at once.

    Raised within, it would leave Flower's threads waiting for ever, for replies and for actors that are gone.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        stop()

    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(one) is not signal.SIG_IGN:
                before[one] = signal.signal(one, handle)
    try:
        yield
    except Exception:
        if not caught:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


@contextmanager
def _ray(cores: int) -> Iterator[None]:
    """Ray for `cores` actors' threads; its processes and its session's folder end with the block."""
    with TemporaryDirectory(prefix="legolm-ray-", dir=ray_place(), ignore_cleanup_errors=True) as folder:
        handler = signal.getsignal(signal.SIGTERM)
        paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        try:
            _start_ray(cores, folder, paths)
            # Ray put its own there, which ends the process without a word.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            yield
        except SystemExit:  # by that one, while Ray started
            raise KeyboardInterrupt from None
        finally:
            ray.shutdown()


def _start_ray(cores: int, folder: str, paths: str) -> None:
    """Start Ray, which waits for itself for half a minute only, less than a cold and busy machine may take.

    Raises `LegolmError` where it does not start, twice.
    """
    for last in (False, True):
        try:
            # Ray would start an actor for each core it finds and take a third of the memory for its store.
            ray.init(
                num_cpus=cores,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            return
        except Exception as error:  # of the node's timeout Ray has no class of its own
            ray.shutdown()
            if last:
                raise LegolmError(
                    f"federation.engine flower: Ray did not start ({brief(error)}); run the same command with "
                    "--resume when the machine is less busy, or set federation.engine to local"
                ) from None


def _exchange(
    grid: Grid,
    node_of: Mapping[str, int],
    actors: int,
    requests: Iterable[Request],
    deadline_s: float | None,
    stopped: threading.Event,
) -> Iterator[Reply]:
    """Push requests, a few for each of `actors` and more while they are small, and give replies as they come.

    A client that crashed or cannot be reached gives an error, not an end, and so does one whose process was killed;
    what waited for a new process in its place is pushed again. A reply that comes again has its index again,
    and one to nothing that was asked `UNASKED`: who asks names and drops them. Raises `LegolmError` once the engine is
    `stopped`.
    """
    queue = enumerate(requests)
    began = time.monotonic()
    waiting: dict[str, tuple[int, Request]] = {}  # by message
    asked: dict[str, int] = {}  # index by message, of all

    def room() -> bool:
        size = sum(len(one.content) for _, one in waiting.values())
        small = len(waiting) < MOST_IN_FLIGHT * actors and size < IN_FLIGHT_BYTES
        return small or len(waiting) < IN_FLIGHT * actors

    def push(index: int, request: Request) -> bool:
        content = RecordDict({"request": ConfigRecord({"content": request.content})})
        # The client `llm`, everyone's data at one place, has no node: any may answer.
        node = node_of.get(request.client, min(node_of.values()))
        sent = list(grid.push_messages([Message(content, node, MessageType.TRAIN)]))
        for message_id in sent:
            waiting[message_id], asked[message_id] = (index, request), index
        return bool(sent)

    while True:
        while room():
            index, request = next(queue, (-1, None))
            if request is None:
                break
            if not push(index, request):
                yield Reply(index, error="its node cannot be reached")
        if not waiting:
            return
        found = list(grid.pull_messages(list(waiting)))
        if stopped.is_set():
            raise LegolmError("federation.engine flower: was stopped")
        for reply in found:
            message_id = reply.metadata.reply_to_message_id
            again = waiting.pop(message_id, None)
            restarts = reply.has_error() and RESTARTS in (reply.error.reason or "")
            if again is None or not restarts or not push(*again):
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
        reason = reply.error.reason or ""
        if any(one in reason.partition(":")[0] for one in KILLED):
            return Reply(index, error="its process was killed; is there memory for all that run at once?")
        lines = reason.strip().splitlines()
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
