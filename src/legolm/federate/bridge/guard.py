"""The guard in front of a SuperLink: registered devices reach what is theirs, and nobody else anything.

Flower 1.42 has its three APIs on one port, and whoever reaches it may start a run, that is, code on this machine and
on every device. Here the fleet's API is for registered keys, the others are for this machine only. Why a device is kept
out is said in one sentence, in the log and to the device; Flower itself gives one number for nearly all. A registered
key is a node of its name from its first call on. `/legolm/` tells a device who it is, and gives it the blocks' files.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from legolm.errors import LegolmError
from legolm.federate.bridge import PIECE
from legolm.federate.bridge.child import end_with_parent
from legolm.trust import REGISTER, Device, pem_of, read_devices

FLEET, OWN = "/v1/fleet/", "/legolm/"
KEY, SIGNATURE, TIME = "flwr-public-key", "flwr-signature", "flwr-timestamp"
LATE_S = 300
"""How old a signed time may be, as in Flower."""
REPEAT_S = 60
"""The same sentence about the same key is logged once in this time."""

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger("legolm.guard")


class ClockError(LegolmError):
    """A signed time is not of now: one of two clocks is wrong, and may come right."""


class Guard:
    """ASGI middleware: `home` has the register of devices, `blocks` is the folder of the run's cut blocks."""

    def __init__(self, app: Any, home: Path, blocks: Path) -> None:
        self._app, self._home, self._blocks = app, home, blocks
        self._known: dict[bytes, Device] = {}
        self._read: float | None = None
        self._nodes: set[bytes] = set()
        self._seen: dict[str, float] = {}
        self._said: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """Let a request through, answer it, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, peer = str(scope["path"]), str((scope.get("client") or ("",))[0])
        if not path.startswith((FLEET, OWN)):
            if _is_here(peer):
                await self._app(scope, receive, send)
            else:
                self._log(f"{peer} asked for {path}, which is for this machine only")
                await _answer(send, 403, {"error": "this is for the server's own machine only"})
            return
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        try:
            device, pem = self._device(headers)
        except LegolmError as error:
            self._log(f"kept out {peer}: {error}")
            await _answer(send, 401, {"error": str(error)})
            return
        self._register(scope, device, pem)
        if path.startswith(FLEET):
            self._seen[device.name] = time.monotonic()
            await self._app(scope, receive, send)
            return
        try:
            _check_signature(headers, pem)
        except LegolmError as error:
            self._log(f"kept out {peer}: {error}")
            await _answer(send, 401, {"error": str(error), "again": isinstance(error, ClockError)})
            return
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin1")).items()}
        await self._own(scope, send, path.removeprefix(OWN), query, device)

    def _device(self, headers: Mapping[str, str]) -> tuple[Device, bytes]:
        """Who has this key. Raises `LegolmError` with why it is kept out."""
        try:
            pem = base64.b64decode(headers.get(KEY, ""), validate=True)
        except binascii.Error:
            pem = b""
        if not pem:
            raise LegolmError("it shows no key; start it with: legolm client")
        device = self._register_of_now().get(pem)
        if device is None:
            raise LegolmError("its key is not registered; on the server: legolm devices add")
        if reason := device.refused(datetime.now(UTC)):
            raise LegolmError(f"{reason}; on the server: legolm devices add, with a new key")
        return device, pem

    def _register_of_now(self) -> dict[bytes, Device]:
        try:
            changed = (self._home / REGISTER).stat().st_mtime_ns
        except OSError:
            changed = 0
        if changed != self._read:
            self._known = {pem_of(one.key): one for one in read_devices(self._home)}
            self._read = changed
        return self._known

    def _register(self, scope: Scope, device: Device, pem: bytes) -> None:
        """Make the key's node in Flower's state, under the device's name."""
        if pem in self._nodes:
            return
        state = scope["app"].state.linkstate_factory.state()
        if state.get_node_id_by_public_key(pem) is None:
            state.create_node("<id:none>", "none", pem, 0, name=device.name)
        self._nodes.add(pem)

    async def _own(self, scope: Scope, send: Send, path: str, query: Mapping[str, str], device: Device) -> None:
        if path == "hello":
            if "anew" in query:  # its node is gone, and Flower would refuse another one for a minute
                state = scope["app"].state.linkstate_factory.state()
                state.deactivate_node(state.get_node_id_by_public_key(pem_of(device.key)))
            seen = self._seen.get(device.name)
            silent = None if seen is None else time.monotonic() - seen
            versions = {name: version(name) for name in ("legolm", "flwr")}
            await _answer(send, 200, {"name": device.name, "silent_s": silent, "versions": versions})
            return
        try:
            kind, block, name = path.split("/", 2)
            file, at = (self._blocks / block / name).resolve(), int(query.get("at", 0))
            if kind != "blocks" or at < 0 or self._blocks.resolve() not in file.parents:
                raise ValueError
            with file.open("rb") as opened:
                opened.seek(at)
                content = opened.read(PIECE)
        except (OSError, ValueError, OverflowError):
            await _answer(send, 404, {"error": f"there is no {path[:200]}"})
            return
        await _answer(send, 200, content)

    def _log(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(text, -REPEAT_S) >= REPEAT_S:
            if len(self._said) > 10_000:
                self._said.clear()
            self._said[text] = now
            log.warning("%s", text)


def _is_here(peer: str) -> bool:
    try:
        return ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return False


def _check_signature(headers: Mapping[str, str], pem: bytes) -> None:
    """Raise `LegolmError` unless the key signed a time, `ClockError` unless that is now."""
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    stamp = headers.get(TIME, "")
    try:
        signature = base64.b64decode(headers.get(SIGNATURE, ""), validate=True)
        good = verify_signature(bytes_to_public_key(pem), stamp.encode(), signature)
        late = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
    except (binascii.Error, ValueError, TypeError):
        good, late = False, 0.0
    if not good:
        raise LegolmError("its signature is not of its key")
    if abs(late) > LATE_S:
        raise ClockError(f"its clock differs by {abs(late):.0f} s from the server's; set it right")


async def _answer(send: Send, status: int, content: bytes | dict[str, Any]) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    kind = b"application/octet-stream" if isinstance(content, bytes) else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """`python -m legolm.federate.bridge.guard HOME BLOCKS [options]`: a `flower-superlink` with its guard."""
    home, blocks = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = ["flower-superlink", *sys.argv[3:]]
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    end_with_parent()
    log.addHandler(logging.StreamHandler())
    log.propagate = False
    extensions.get_middleware = lambda: (Middleware(Guard, home=home, blocks=blocks),)
    flower_superlink()


if __name__ == "__main__":
    main()
