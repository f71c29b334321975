"""Devices of their own without Flower: what asks them and what answers, in one process, one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from legolm.config import RunConfig
from legolm.federate.bridge import PIECE
from legolm.federate.client import Holdings, Profile, Resident
from legolm.federate.transport.deployment import Asking
from legolm.federate.transport.engine import Body
from legolm.runs import RunDir


class Residents:
    """An engine that reaches these clients' resident processes; `wire` are all bytes that pass, `said` their logs."""

    def __init__(self, folder: Path, clients: Sequence[str], memory_mb: Mapping[str, float] | None = None) -> None:
        self._folder, self._clients, self._memory = folder, clients, memory_mb or {}
        self.wire: list[bytes] = []
        self.said: dict[str, list[str]] = {id: [] for id in clients}
        self.left: Callable[[str], bool] = lambda client: False
        self._replies: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._sent = 0

    def __call__(self, run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def piece(path: str, at: int) -> bytes:
            return (run.path / "blocks" / path).read_bytes()[at : at + PIECE]

        self._residents = {
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
        }
        for id in self._clients:
            (self._folder / "devices" / id).mkdir(parents=True, exist_ok=True)
        body(Asking(run, config, self, self.said.setdefault("", []).append).exchange)  # type: ignore[arg-type]

    # As `Flower` of the SuperLink.

    def ready(self) -> bool:
        return True

    def nodes(self) -> dict[str, tuple[str, str]]:
        return {id: (id, "0") for id in self._clients if not self.left(id)}

    def push(self, node: str, welcome: str, request: bytes) -> str | None:
        self._sent += 1
        self.wire += [welcome.encode(), request]
        header, reply = self._residents[node].answer(welcome, request)
        self.wire += [repr(header).encode(), reply]
        self._replies[str(self._sent)] = header, reply
        return str(self._sent)

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        found = [(id, *self._replies.pop(id)) for id in ids if id in self._replies]
        return [({"id": id, **header}, reply) for id, header, reply in found]

    def wait(self, seconds: float) -> None:
        return
