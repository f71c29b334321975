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
    """An engine that reaches these clients' resident processes; `wire` are all bytes that pass, `said` their logs."""

    def __init__(self, folder: Path, clients: Sequence[str], memory_mb: Mapping[str, float] | None = None) -> None:
        self._folder, self._clients, self._memory = folder, clients, memory_mb or {}
        self.wire: list[bytes] = []
        self.said: dict[str, list[str]] = {id: [] for id in clients}
        self.others: dict[str, Callable[[Piece], Answering]] = {}
        self.left: Callable[[str], bool] = lambda client: False
        self._replies: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._sent = 0

    def __call__(self, run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        self.begin(run.path / "blocks")
        body(Asking(those(run, config), self, self.said.setdefault("", []).append).exchange)  # type: ignore[arg-type]

    def begin(self, blocks: Path) -> None:
        """Start the residents, which get their blocks' files from there; `others` are what they are."""

        def piece(path: str, at: int) -> bytes:
            return (blocks / path).read_bytes()[at : at + PIECE]

        for id in self._clients:
            (self._folder / "devices" / id).mkdir(parents=True, exist_ok=True)
        self._residents: dict[str, Answering] = {
            id: Resident(
                Holdings(
                    self._folder / "devices" / id,
                    (str(self._folder / "data" / f"{id}.jsonl"),),
                    profile=Profile("cpu"),
                    memory_mb=self._memory.get(id),
                ),
                id,
                piece,
                self.said[id].append,
            )
            for id in self._clients
            if id not in self.others
        }
        self._residents |= {id: make(piece) for id, make in self.others.items()}

    # As `Flower` of the SuperLink.

    def ready(self) -> bool:
        return True

    def nodes(self) -> dict[str, tuple[str, str]]:
        return {id: (id, "0") for id in self._clients if not self.left(id)}

    def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        self._sent += 1
        self.wire += [welcome.encode(), request]
        header, reply = self._residents[node].answer(welcome, request, left_s)
        self.wire += [repr(header).encode(), reply]
        self._replies[str(self._sent)] = header, reply
        return str(self._sent)

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        found = [(id, *self._replies.pop(id)) for id in ids if id in self._replies]
        return [({"id": id, **header}, reply) for id, header, reply in found]

    def wait(self, seconds: float) -> None:
        return
