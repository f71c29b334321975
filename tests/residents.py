"""Devices of their own without Flower: what asks them and what answers, in one process, one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from legolm.config import RunConfig
from legolm.federate.bridge import PIECE
from legolm.federate.client import Answering, Holdings, Piece, Profile, Resident
from legolm.federate.transport.deployment import Asking, those
from legolm.federate.transport.engine import Body
from legolm.runs import RunDir


class Residents:
    """An engine that reaches these clients' resident processes; `wire` are all bytes that pass, `said` their logs.

    `loses` is called before a client gets a request: with which of Flower's errors its reply is lost, 0 for none.
    """

    def __init__(
        self,
        folder: Path,
        clients: Sequence[str],
        memory_mb: Mapping[str, float] | None = None,
        roster: Path | None = None,
    ) -> None:
        self._folder, self._clients, self._memory, self._roster = folder, clients, memory_mb or {}, roster
        self.wire: list[bytes] = []
        self.said: dict[str, list[str]] = {id: [] for id in clients}
        self.others: dict[str, Callable[[Piece], Answering]] = {}
        self.left: Callable[[str], bool] = lambda client: False
        self.loses: Callable[[str, bytes], int] = lambda client, request: 0
        self._replies: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._sent = 0

    def __call__(self, run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        self.begin(run.path / "blocks")
        body(Asking(those(run, config), self, self.said.setdefault("", []).append).exchange)  # type: ignore[arg-type]

    def begin(self, blocks: Path) -> None:
        """Start the residents, which get their blocks' files from there; `others` are what they are."""

        def piece(path: str, at: int) -> bytes:
            return (blocks / path).read_bytes()[at : at + PIECE]

        self._piece = piece
        self.residents: dict[str, Answering] = {id: make(piece) for id, make in self.others.items()}
        for id in self._clients:
            if id not in self.others:
                self.start(id)

    def start(self, id: str) -> None:
        """Start a resident, or start it again: what it had in memory is lost."""
        home, rows = self._folder / "devices" / id, str(self._folder / "data" / f"{id}.jsonl")
        home.mkdir(parents=True, exist_ok=True)
        profile, memory = Profile("cpu"), self._memory.get(id)
        held = Holdings(home, (rows,), profile=profile, memory_mb=memory, roster=self._roster)
        self.residents[id] = Resident(held, id, self._piece, self.said[id].append)

    # As `Flower` of the SuperLink.

    def ready(self) -> bool:
        return True

    def nodes(self) -> dict[str, tuple[str, str]]:
        return {id: (id, "0") for id in self._clients if not self.left(id)}

    def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        self._sent += 1
        self.wire += [welcome.encode(), request]
        lost = self.loses(node, request)
        header, reply = self.residents[node].answer(welcome, request, left_s)
        self.wire += [repr(header).encode(), reply]
        if lost:
            header, reply = {"code": lost, "error": "it was lost"}, b""
        self._replies[str(self._sent)] = header, reply
        return str(self._sent)

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        found = [(id, *self._replies.pop(id)) for id in ids if id in self._replies]
        return [({"id": id, **header}, reply) for id, header, reply in found]

    def wait(self, seconds: float) -> None:
        return
