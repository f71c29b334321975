"""The guard from other machines, and the apps, which travel alone."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from legolm.federate.bridge import APP, FOLDER
from legolm.federate.bridge.guard import Guard
from legolm.trust import add_device, make_key, pem_of


class Nodes:
    """Flower's state: nodes by key."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}
        self.linkstate_factory = self

    def state(self) -> Nodes:
        return self

    def get_node_id_by_public_key(self, key: bytes) -> int | None:
        return list(self.names).index(key) if key in self.names else None

    def create_node(self, owner: str, account: str, key: bytes, interval: float, name: str) -> int:
        self.names[key] = name
        return len(self.names) - 1


class Asked:
    """What of requests came through the guard, and what it answered to the others."""

    def __init__(self, home: Path) -> None:
        self.through: list[str] = []
        self.state = Nodes()
        self._guard = Guard(self._app, home, home / "blocks")

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.through.append(scope["path"])

    def get(self, path: str, peer: str, **headers: str) -> tuple[int, str]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": path, "client": (peer, 1), "headers": given, "query_string": b"", "app": self}
        asyncio.run(self._guard(scope, lambda: None, send))  # type: ignore[arg-type, return-value]
        return (sent[0]["status"], json.loads(sent[1]["body"])["error"]) if sent else (0, "")


def test_others_reach_only_what_is_theirs(tmp_path: Path) -> None:
    device = add_device(tmp_path, "fr", make_key(tmp_path / "fr"))
    shown = {"flwr-public-key": base64.b64encode(pem_of(device.key)).decode()}
    asked = Asked(tmp_path)
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/"):
        for peer in ("10.0.0.7", "2001:db8::1", "", "localhost.example.org"):
            assert asked.get(path, peer, **shown) == (403, "this is for the server's own machine only")
        assert asked.get(path, "127.0.0.1") == (0, "")
    assert len(asked.through) == 4 and not asked.state.names
    for wrong in ({}, {"flwr-public-key": "%%"}, {"flwr-public-key": "aGVsbG8="}):
        assert asked.get("/v1/fleet/pull-messages", "127.0.0.1", **wrong)[0] == 401
    assert asked.get("/v1/fleet/pull-messages", "10.0.0.7", **shown) == (0, "")
    assert asked.state.names == {pem_of(device.key): "fr"}
    # A key alone, without its signature, tells and gives nothing.
    assert asked.get("/legolm/hello", "10.0.0.7", **shown) == (401, "its signature is not of its key")
    assert asked.through[4:] == ["/v1/fleet/pull-messages"]


def test_the_register_is_read_again(tmp_path: Path) -> None:
    public, asked = make_key(tmp_path / "fr"), Asked(tmp_path)
    key = base64.b64encode(pem_of(public.read_text())).decode()
    assert asked.get("/v1/fleet/x", "10.0.0.7", **{"flwr-public-key": key})[0] == 401
    add_device(tmp_path, "fr", public)
    assert asked.get("/v1/fleet/x", "10.0.0.7", **{"flwr-public-key": key}) == (0, "")


@pytest.mark.parametrize("name", APP)
def test_what_travels_needs_flower_only(name: str) -> None:
    for node in ast.walk(ast.parse((FOLDER / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] in {"flwr", "__future__", "types", "typing", "pathlib"}
