"""The way over Flower's grid where replies come twice, to nothing, with nothing in them, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

from helpers import load
from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.client import ClientRuntime, simulated
from legolm.federate.transport import Exchange, Reply, Request
from legolm.federate.transport.engine import Body
from legolm.federate.transport.flower import _exchange, _start_ray
from legolm.plan import make_plan
from legolm.runs import RunDir
from legolm.system import Progress

Replies = Callable[[Message], list[Message]]
DIED = "<class 'ray.exceptions.ActorUnavailableError'>:<'The actor 1a is unavailable: RpcError: Socket closed.'>"
RESTARTS = "<class 'ray.exceptions.ActorUnavailableError'>:<'The actor 1a is unavailable: The actor is restarting.'>"
RAISED = "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'Traceback:\nClientAppException: no'>"
"""What Flower says of an actor that was killed, of one that is not back yet, and of a client that raised."""


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made in a task of Flower's; one that a real run in this process began is put back."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class OddGrid(Grid):
    """Clients in this process; `answers` gives what comes back for a message, `gone` are nodes that nothing reaches."""

    run, set_run, create_message, send_and_receive = None, None, None, None  # type: ignore[assignment]

    def __init__(self, answers: Replies, gone: Iterable[int] = ()) -> None:
        self._answers, self._gone, self._sent = answers, set(gone), list[Message]()
        self._number = count()

    def get_node_ids(self) -> Iterable[int]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        there = [one for one in messages if one.metadata.dst_node_id not in self._gone]
        for one in there:
            one.metadata.__dict__["_message_id"] = f"m{next(self._number)}"
        self._sent += there
        return [one.metadata.message_id for one in there]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        sent, self._sent = self._sent, []
        assert {one.metadata.message_id for one in sent} <= wanted
        return [reply for one in sent for reply in self._answers(one)]


def config_reply(request: Message, **content: Any) -> Message:
    return Message(RecordDict({"reply": ConfigRecord(content)}), reply_to=request)


NODES = {"fr": 1, "de": 2, "es": 3}


def sent_back(replies: Replies, gone: Iterable[int] = ()) -> list[Reply]:
    requests = [Request(id, id.encode()) for id in NODES]
    return list(_exchange(OddGrid(replies, gone), NODES, 1, requests, None, Event()))


def test_whatever_comes_is_a_reply_with_an_index() -> None:
    def answers(request: Message) -> list[Message]:
        node = request.metadata.dst_node_id
        good = config_reply(request, content=b"x")
        stray = config_reply(request, content=b"y")
        stray.metadata.__dict__["_reply_to_message_id"] = "another"
        return {1: [good, good], 2: [stray, good], 3: [good]}[node]

    found = [(one.index, one.content) for one in sent_back(answers)]
    assert found == [(0, b"x"), (0, b"x"), (-1, b"y"), (1, b"x"), (2, b"x")]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda request: Message(RecordDict({}), reply_to=request), "its message has no reply in it"),
        (lambda request: config_reply(request, content="text"), "its message has no reply in it"),
        (lambda request: config_reply(request, content=[1.0]), "its message has no reply in it"),
        (lambda request: config_reply(request, error="not now"), "not now"),
        (lambda request: Message(Error(0, "  \n "), reply_to=request), "the client crashed"),
        (lambda request: Message(Error(0, "Traceback:\n  at 7\nValueError: no"), reply_to=request), "ValueError: no"),
        (lambda request: Message(Error(0, RAISED), reply_to=request), "ClientAppException: no"),
        (lambda request: Message(Error(0, DIED), reply_to=request), "its process was killed; is there memory for all"),
    ],
)
def test_what_is_no_reply_is_an_error(answer: Callable[[Message], Message], says: str) -> None:
    found = sent_back(lambda request: [answer(request)])
    assert [one.index for one in found] == [0, 1, 2] and all(one.error.startswith(says) for one in found)


def test_what_waits_for_a_process_that_restarts_is_asked_again() -> None:
    restarting = {1: 2, 3: 1}

    def answers(request: Message) -> list[Message]:
        node = request.metadata.dst_node_id
        restarting[node] = restarting.get(node, 0) - 1
        return [
            config_reply(request, content=b"x")
            if restarting[node] < 0
            else Message(Error(0, RESTARTS), reply_to=request)
        ]

    assert [(one.index, one.content) for one in sent_back(answers)] == [(1, b"x"), (2, b"x"), (0, b"x")]


def test_a_node_that_cannot_be_reached_is_an_error() -> None:
    found = sent_back(lambda request: [config_reply(request, content=b"x")], gone=[2])
    assert {(one.index, one.error) for one in found} == {(0, ""), (1, "its node cannot be reached"), (2, "")}


def test_a_run_goes_on_and_names_them(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """`fr` answers training twice, `de` once to nothing and once, `es` with a screen full of control codes."""
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}
    raw["federation"]["rounds"] = 1
    config = configs.validate(RunConfig, raw, "test")

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        runtime = ClientRuntime(simulated(run))

        def answers(request: Message) -> list[Message]:
            content = request.content.config_records["request"]["content"]
            assert isinstance(content, bytes)
            good = config_reply(request, content=runtime.answer(content))
            if wire.kind_of(content) != "train":
                return [good]
            stray = config_reply(request, content=b"y")
            stray.metadata.__dict__["_reply_to_message_id"] = "another"
            loud = config_reply(request, error="\x1b[2J" + "x" * 10_000)
            return {1: [good, good], 2: [stray, good], 3: [loud]}[request.metadata.dst_node_id]

        grid = OddGrid(answers)

        def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            return _exchange(grid, NODES, actors, requests, deadline_s, Event())

        found: Exchange = exchange
        body(found)

    said = StringIO()
    progress = Progress(Console(file=said, width=200))
    summary = pipeline.run(config, tmp_path / "out", engine=engine, progress=progress, models=False)
    assert "round 1: train: one more reply of fr (request 0) was dropped" in said.getvalue()
    assert "round 1: train: one more reply of nobody (request -1) was dropped" in said.getvalue()
    last = summary.history[-1]
    assert last.accepted == ["fr", "de"] and last.refused[0].client == "es"
    assert last.refused[0].reason == " [2J" + "x" * 296


class Busy:
    """In Ray's place on a machine that is too busy for it, at first."""

    def __init__(self, fails: int) -> None:
        self.left, self.ended = fails, 0

    def init(self, **_: object) -> None:
        if self.left:
            self.left -= 1
            raise Exception("The current node timed out during startup. This could happen")  # Ray's own words and class

    def shutdown(self) -> None:
        self.ended += 1


def test_ray_that_is_slow_to_start_is_started_again_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    once, twice = Busy(1), Busy(2)
    monkeypatch.setattr("legolm.federate.transport.flower.ray", once)
    _start_ray(2, "folder", "paths")
    assert (once.left, once.ended) == (0, 1)
    monkeypatch.setattr("legolm.federate.transport.flower.ray", twice)
    with pytest.raises(LegolmError, match=r"Ray did not start \(The current node timed out .*\); run the same command"):
        _start_ray(2, "folder", "paths")


def test_ray_starts_whatever_the_length_of_tmpdir(tmp_path: Path) -> None:
    """In a process of its own, which ends with all that Ray started."""
    long = tmp_path / ("of_a_batch_job" * 5)
    long.mkdir()
    code = "from legolm.federate.transport.flower import _ray\nwith _ray(1): print('started')"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"TMPDIR": str(long)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["started"], done.stderr


def test_no_place_for_rays_sockets_is_refused_in_the_plan(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("of_a_batch_job" * 5)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    config = load(three_clients(tmp_path, ("half", "half", "half")), tmp_path, "federation.engine=flower")
    make_plan(config)
    monkeypatch.setattr("legolm.system.sockets.os.access", lambda folder, mode: folder != "/tmp")
    with pytest.raises(
        LegolmError, match=r"^TMPDIR \S+of_a_batch_job: is too long .* a folder of at most \d\d letters"
    ):
        make_plan(config)
