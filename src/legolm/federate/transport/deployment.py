"""Flower's deployment engine: devices of their own, each asked until it answers or the deadline is over.

A reply is on disk before it is given, under the hash of its request: a run that was killed asks nobody again for what
it has, and a device gives the same reply to the same request without a second training.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from legolm.config import RunConfig
from legolm.errors import brief
from legolm.federate.transport.engine import Body, Reply, Request, late
from legolm.federate.transport.superlink import Flower, LostError
from legolm.federate.wire import (
    CalibrateRequest,
    ConfirmRequest,
    EvaluateRequest,
    KeysRequest,
    OfferRequest,
    SharesRequest,
    SumRequest,
    TrainRequest,
    UnmaskRequest,
    Welcome,
    block_files,
    kind_of,
    own_data,
    unpack,
)
from legolm.runs import Kept, Live, RunDir, State
from legolm.system import Progress

POLL_S = 0.5
NODES_S = 2.0
"""From one look at who is online to the next."""
AGAIN_S = 5.0
"""Before a device that could not answer is asked again."""
AWAY_S = 30.0
"""A device that is not online for so long is named."""
REQUESTS: Mapping[
    str, type[TrainRequest | EvaluateRequest | OfferRequest | CalibrateRequest | KeysRequest | SumRequest]
] = {
    "train": TrainRequest,
    "evaluate": EvaluateRequest,
    "offer": OfferRequest,
    "calibrate": CalibrateRequest,
    "keys": KeysRequest,
    "shares": SharesRequest,
    "confirm": ConfirmRequest,
    "unmask": UnmaskRequest,
}
"""Kinds of requests; all but an offer are about a block."""
MOST_WAITING = 64
"""Requests in memory at once."""
TRANSIENT = {3, 4, 5, 8}
"""Flower's errors that are of the way, not of the request: a message or reply lost, a node gone, an app crashed."""


@dataclass
class _Waiting:
    """A request under way: what it is, and the message that carries it now."""

    index: int
    client: str
    content: bytes
    welcome: str
    message: str | None = None
    not_before: float = 0.0


@dataclass(frozen=True)
class Those:
    """Who may be asked, and what each is told beside a request.

    `folder` has replies and `live.json`, `round` counts the rounds whose replies are not needed any more, `away_s` is
    how long a device that is not online is waited for where there is no deadline.
    """

    folder: Path
    clients: Callable[[], Collection[str]]
    welcome: Callable[[Request], str]
    round: Callable[[], int]
    away_s: float | None = None


def those(run: RunDir, config: RunConfig) -> Those:
    """The clients of a run."""
    ids, known = [client.id for client in config.clients], dict[tuple[str, str], str]()
    files = cache(lambda block: block_files(run.block(block)))  # which reads all that a block holds
    relays = {client.id for client in config.clients if client.relay}

    def welcome(request: Request) -> str:
        """Made once for each client and block."""
        header = unpack(request.content, REQUESTS[kind_of(request.content)])[0]
        block = "" if isinstance(header, OfferRequest) else header.block
        key = id, block = request.client, block
        if key not in known:
            held, data = files(block) if block else [], own_data(config, id)
            told = Welcome(run=header.run, client=id, block=block, relay=id in relays, files=held, data=data)
            known[key] = told.model_dump_json()
        return known[key]

    return Those(run.path, lambda: ids, welcome, run.rounds_done, config.federation.deadline_s)


def run_deployment(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """Run `body` with a way to the devices that the SuperLink knows by their clients' names."""
    note, path = Progress().note, run.path.resolve()
    with Flower(path / "flower", path / "blocks", config.federation.superlink, note) as flower:
        asking = Asking(those(run, config), flower, note)
        body(asking.exchange)
    shutil.rmtree(run.path / "replies", ignore_errors=True)  # each is in its stage


class Asking:
    """Asks devices over whatever Flower run there is."""

    def __init__(self, those: Those, flower: Flower, note: Callable[[str], None]) -> None:
        self._those, self._flower, self._note = those, flower, note
        self._nodes: dict[str, tuple[str, str]] = {}
        self._looked = 0.0
        self._away: dict[str, float] = {}
        self._named: set[str] = set()
        self._said: dict[str, str] = {}
        self._live = Live({})
        self._until: float | None = None
        self._carried: dict[tuple[str, bytes], str] = {}

    def exchange(self, requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        """Of a device that is away, or cannot answer now, the same is asked again until `deadline_s`.

        Where there is none, a device has no end of time to work, and `federation.deadline_s` to come back. Where nobody
        wants the rest of the replies, the devices go on with their requests, and who asks the same again gets them.
        """
        waiting: list[_Waiting] = []
        try:
            yield from self._exchange(requests, deadline_s, waiting)
        finally:
            self._carried = {(one.client, one.content): one.message for one in waiting if one.message is not None}

    def _exchange(
        self, requests: Iterable[Request], deadline_s: float | None, waiting: list[_Waiting]
    ) -> Iterator[Reply]:
        queue, began = enumerate(requests), time.monotonic()
        self._until = None if deadline_s is None else began + deadline_s
        kept = self._kept()
        more = True
        self._away.clear()
        while more or waiting:
            while more and len(waiting) < MOST_WAITING:
                index, request = next(queue, (-1, None))
                if request is None:
                    more = False
                elif (found := kept.get(request.content)) is not None:
                    yield Reply(index, found)
                else:
                    welcome = self._those.welcome(request)
                    message = self._carried.pop((request.client, request.content), None)
                    waiting.append(_Waiting(index, request.client, request.content, welcome, message))
            for one, reply in self._turn(waiting):
                waiting.remove(one)
                if reply.content:
                    kept.put(one.content, reply.content)
                yield reply
            passed = time.monotonic() - began
            if deadline_s is not None and passed > deadline_s:
                left = [one.index for one in waiting] + [index for index, _ in queue]
                yield from (Reply(index, error=late(deadline_s)) for index in left)
                return
            for one in list(waiting) if deadline_s is None else ():
                if reason := self._given_up(one.client):
                    waiting.remove(one)
                    yield Reply(one.index, error=reason)
            self._write_live(waiting)

    def _turn(self, waiting: list[_Waiting]) -> list[tuple[_Waiting, Reply]]:
        """Send what can be sent, take what came, and wait a little where that is nothing."""
        try:
            if not self._flower.ready():
                raise LostError
            self._look(waiting)
            self._send(waiting)
            sent = {one.message: one for one in waiting if one.message is not None}
            found = self._take(sent, self._flower.pull(list(sent)) if sent else [])  # type: ignore[arg-type]
        except LostError:
            found = []
            for one in waiting:
                one.message = None
        if not found:
            self._flower.wait(POLL_S)
        return found

    def _look(self, waiting: list[_Waiting]) -> None:
        """Who is online, and since when the others are not. What a node had that began anew is lost, without a word."""
        now = time.monotonic()
        if now - self._looked < NODES_S:
            return
        before, self._looked = self._nodes, now
        self._nodes = self._flower.nodes()
        for one in waiting:
            if one.message is not None and self._nodes.get(one.client, ("",)) != before.get(one.client):
                one.message = None
        known = set(self._those.clients())
        for name in sorted(set(self._nodes) - known - self._named):
            self._note(f"device {name or '(without a name)'} is online and no client of this run; nobody asks it")
            self._named.add(name)
        for id in known & set(self._nodes):
            if id in self._named:
                self._note(f"device {id} is back")
            self._away.pop(id, None)
            self._named.discard(id)

    def _send(self, waiting: list[_Waiting]) -> None:
        """One message at a time to each device: more would only wait there."""
        now, busy = time.monotonic(), {one.client for one in waiting if one.message is not None}
        for one in waiting:
            if one.client not in self._nodes:
                since = self._away.setdefault(one.client, now)
                if now - since > AWAY_S and one.client not in self._named:
                    self._note(f"device {one.client} is not online; it is asked when it comes")
                    self._named.add(one.client)
            elif one.client not in busy and one.not_before <= now:
                left = None if self._until is None else max(self._until - now, 0.0)
                one.message = self._flower.push(self._nodes[one.client][0], one.welcome, one.content, left)
                one.not_before = now + AGAIN_S
                busy.add(one.client)

    def _take(
        self, sent: Mapping[str | None, _Waiting], came: list[tuple[dict[str, Any], bytes]]
    ) -> list[tuple[_Waiting, Reply]]:
        found = []
        for header, content in came:
            one = sent.get(header["id"])
            if one is None or one.message is None:
                continue  # of a message that was given up
            one.message = None
            again = header.get("again") or (header.get("error") if header.get("code") in TRANSIENT else None)
            if again:
                one.not_before = time.monotonic() + AGAIN_S
                if self._said.get(one.client) != again:
                    self._note(f"device {one.client}: {brief(again)}; it is asked again")
                self._said[one.client] = again
                continue
            self._said.pop(one.client, None)
            lines = (header.get("error") or "").strip().splitlines()
            error = "" if content else (lines[-1] if lines else "its message has no reply in it")
            found.append((one, Reply(one.index, content, error)))
        return found

    def _given_up(self, client: str) -> str:
        """Why a device that is away is not waited for any more; empty where it is."""
        most, since = self._those.away_s, self._away.get(client)
        if most is None or since is None or time.monotonic() - since <= most:
            return ""
        return f"late: not online for federation.deadline_s, {most:g} s"

    def _kept(self) -> Kept:
        """Replies since the last finished round; what is older is in its round."""
        folder, now = self._those.folder / "replies", f"{self._those.round():04d}"
        for old in folder.iterdir() if folder.exists() else ():
            if old.name != now:
                shutil.rmtree(old)
        return Kept(folder / now)

    def _write_live(self, waiting: list[_Waiting]) -> None:
        asked: dict[str, State] = {}
        for one in waiting:
            asked[one.client] = "working" if one.message is not None else asked.get(one.client, "asked")
        states = {id: asked.get(id, "idle") if id in self._nodes else "away" for id in self._those.clients()}
        live = self._live.now(states)  # type: ignore[arg-type]
        if live != self._live:
            self._live = live
            live.write(self._those.folder)
