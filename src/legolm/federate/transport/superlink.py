"""The server's side of Flower: its SuperLink and SuperExec, kept running, and one Flower run after the other.

A Flower run is disposable: it ends for good when a machine is away for a minute. What is asked and answered is in the
run's process and folder, and the next Flower run goes on with it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from legolm.config import SuperLinkConfig
from legolm.errors import LegolmError, brief
from legolm.federate.bridge import APP, FOLDER, Link, listen
from legolm.system import Helpers, atomic_write, sockets_place
from legolm.trust import server_files, write_secret

LINK, EXEC, SUBMIT = "superlink", "superexec", "submit"
CONNECTION = "legolm"
"""Of the SuperLink in Flower's own configuration."""
STARTS_S = 180.0
"""A Flower run of which no process is there after this time is submitted again."""
ANSWERS_S = 120.0
"""Flower's app answers each question within seconds, or something between is gone."""
AGAIN_S = 5.0
ENDS_S, LOOK_S = 5.0, 0.5
EARLY_S, TRIES = 20.0, 3
"""A helper that ends so early for the third time will not run."""
PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "legolm-app"
version = "1.0.0"
description = "Passes the bytes of a legolm run"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "legolm"

[tool.flwr.app.components]
serverapp = "legolm_app.server_app:app"
clientapp = "legolm_app.client_app:app"

[tool.flwr.app.config]
socket = ""
"""


class LostError(Exception):
    """The Flower run is over, and with it all that was sent in it and not answered."""


class Flower:
    """A Flower run to speak with, whichever it is; starts what is needed, and starts it again when it ends.

    Its logs and state are in `folder`; devices get blocks' files from `blocks`. Both paths are absolute.
    Raises `LegolmError` for certificates that are missing or no longer valid, and for a port in use.
    """

    def __init__(self, folder: Path, blocks: Path, settings: SuperLinkConfig, note: Callable[[str], None]) -> None:
        self._folder, self._blocks, self._settings, self._note = folder, blocks, settings, note
        if self._settings.address is None:
            self._certificates = server_files(Path(self._settings.home))
            check_port(self._settings.host, self._settings.port)
        self._sockets = TemporaryDirectory(prefix="legolm-", dir=sockets_place(len("/legolm-12345678/run")))
        self._listener = listen(f"{self._sockets.name}/run")
        environment = {
            "FLWR_HOME": str(self._folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self._helpers = Helpers(self._folder, environment)
        self._link: Link | None = None
        self._submitted = -STARTS_S
        self._started: dict[str, float] = {}
        self._early: dict[str, int] = {}
        self._over = False

    def __enter__(self) -> Flower:
        self._write_app()
        self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over = True
        if self._link is not None:
            self._link.close()
        self._listener.close()
        self._helpers.stop(SUBMIT, EXEC, LINK)
        self._sockets.cleanup()

    def nodes(self) -> dict[str, tuple[str, str]]:
        """Of the nodes that are online, by their registered names: id, and since when. Raises `LostError`."""
        header = self._ask({"do": "nodes"})
        return {str(name): (str(id), str(since)) for id, name, since in header["nodes"]}

    def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        """Send a request, and how many seconds there are for its answer.

        Gives the message's id, None where the node cannot be reached. Raises `LostError`.
        """
        found = self._ask({"do": "push", "node": node, "welcome": welcome, "left_s": left_s}, request)["id"]
        return None if found is None else str(found)

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        """What came for these messages: `id`, and with it the reply, or `error` (and `code`) or `again`.

        Raises `LostError`.
        """
        found = []
        header = self._ask({"do": "pull", "ids": list(ids)})
        while header:
            found.append((header, self._body))
            header = self._receive()
        return found

    def wait(self, seconds: float) -> None:
        """Pass the time, and keep all that runs running."""
        self._watch()
        time.sleep(seconds)

    def ready(self) -> bool:
        """Whether a Flower run is there to speak with."""
        self._watch()
        if self._link is None and select.select([self._listener], [], [], 0)[0]:
            connection, _ = self._listener.accept()
            connection.settimeout(ANSWERS_S)
            self._link = Link(connection)
        return self._link is not None

    def _ask(self, header: dict[str, object], body: bytes = b"") -> dict[str, Any]:
        if self._link is None:
            raise LostError
        try:
            self._link.send(header, body)
        except OSError as error:
            self._lose(error)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """What Flower's app says. A SuperLink that ended meanwhile is started again: the app waits for it."""
        assert self._link is not None
        until = time.monotonic() + ANSWERS_S
        try:
            while not select.select([self._link], [], [], LOOK_S)[0]:
                self._watch()
                if time.monotonic() > until:
                    raise TimeoutError(f"its app said nothing for {ANSWERS_S:g} s")
            header, self._body = self._link.receive()
        except OSError as error:
            self._lose(error)
        return header

    def _lose(self, error: OSError) -> None:
        assert self._link is not None
        self._link.close()
        self._link, self._submitted = None, -STARTS_S
        self._helpers.stop(EXEC)  # and with it what may be left of the run's process
        del self._started[EXEC]
        self._note(f"Flower's run ended ({brief(error)}); it is submitted again, and what was sent is asked again")
        raise LostError from None

    def _watch(self) -> None:
        """Start what is not running, and submit a run where there is none."""
        if self._over:  # another thread may look on while this one ends all
            return
        if self._settings.address is None:
            self._keep(LINK, self._superlink)
        self._keep(EXEC, self._superexec)
        due = self._link is None and time.monotonic() - self._submitted > STARTS_S
        if due and not self._helpers.works(EXEC) and self._answers():
            self._helpers.start(SUBMIT, ["flwr", "run", str(self._folder / "app"), CONNECTION, *self._run_config()])
            self._submitted = time.monotonic()
        elif self._link is None and self._submit_failed():
            self._submitted = time.monotonic() - STARTS_S + AGAIN_S

    def _keep(self, name: str, command: Callable[[], list[str]]) -> None:
        """Start a helper that does not run. Raises `LegolmError` for one that ends each time as soon as it begins."""
        if self._helpers.alive(name):
            return
        now = time.monotonic()
        if name in self._started:
            # With a SuperLink all ends that is connected to it: that is no fault of its own.
            drawn = name != LINK and self._started.get(LINK, 0.0) > self._started[name]
            early = now - self._started[name] < EARLY_S and not drawn
            self._early[name] = self._early.get(name, 0) + 1 if early else 0
            self._note(f"Flower's {name} ended; it is started again ({self._helpers.log(name)} says more)")
        if self._early.get(name, 0) >= TRIES:
            raise LegolmError(f"Flower's {name} ends as soon as it begins: {brief(self._last_line(name))}")
        self._helpers.start(name, command())
        self._started[name] = now

    def _last_line(self, name: str) -> str:
        lines = self._helpers.log(name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"

    def _submit_failed(self) -> bool:
        """Whether the last submission ended without a run."""
        code = self._helpers.ended(SUBMIT)
        if not code or time.monotonic() - self._submitted > STARTS_S - AGAIN_S:
            return False
        self._note(f"flwr run: {brief(self._last_line(SUBMIT))}; trying again")
        return True

    def _answers(self) -> bool:
        """Whether somebody listens at the SuperLink's address."""
        host, _, port = self._address().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    def _address(self) -> str:
        return self._settings.address or f"127.0.0.1:{self._settings.port}"

    def _root(self) -> Path | None:
        if self._settings.address is None:
            return self._certificates[0].resolve()
        given = self._settings.root_certificates
        return None if given is None else Path(given).resolve()

    def _superlink(self) -> list[str]:
        authority, certificate, key = (str(path.resolve()) for path in self._certificates)
        home = Path(self._settings.home).resolve()
        options = {
            "--ssl-ca-certfile": authority,
            "--ssl-certfile": certificate,
            "--ssl-keyfile": key,
            "--host": self._settings.host,
            "--port": str(self._settings.port),
            "--isolation": "process",
            "--superexec-auth-secret-file": str(self._secret()),
            "--database": str(self._folder / "superlink.db"),
        }
        command = [sys.executable, "-m", "legolm.federate.bridge.guard", str(home), str(self._blocks)]
        flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        return [*command, *(word for pair in options.items() for word in pair), *flags]

    def _superexec(self) -> list[str]:
        options = ["--runtime-api-address", self._address(), "--parent-pid", str(os.getpid())]
        root = self._root()
        if root is not None:
            options += ["--root-certificates", str(root)]
        if self._settings.address is None:
            options += ["--superexec-auth-secret-file", str(self._secret())]
        return ["flower-superexec", *options]

    def _secret(self) -> Path:
        path = self._folder / "superexec.secret"
        if not path.exists():
            write_secret(path, secrets.token_hex(32).encode())
        return path

    def _run_config(self) -> list[str]:
        return ["--run-config", f'socket="{self._sockets.name}/run"']

    def _write_app(self) -> None:
        """The Flower app, and how Flower's command reaches the SuperLink."""
        app = self._folder / "app"
        shutil.rmtree(app, ignore_errors=True)
        (app / "legolm_app").mkdir(parents=True)
        (app / "pyproject.toml").write_text(PYPROJECT)
        for name in APP:
            shutil.copyfile(FOLDER / name, app / "legolm_app" / name)
        lines = [f"[superlink.{CONNECTION}]", f"address = {json.dumps(self._address())}"]
        if (root := self._root()) is not None:
            lines.append(f"root-certificates = {json.dumps(str(root))}")
        atomic_write(self._folder / "home" / "config.toml", "\n".join(lines) + "\n")


def check_port(host: str, port: int) -> None:
    """Raise `LegolmError` where another program listens there, or this machine has no such address.

    The SuperLink of a run that was killed has a moment to end.
    """
    until = time.monotonic() + ENDS_S
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(found[0], socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(found[4])
                return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise LegolmError(
                    f"federation.superlink: {host}:{port} cannot be used ({error.strerror or error}); end the program "
                    "that listens there, or set federation.superlink.port to a free one"
                ) from None
            time.sleep(LOOK_S)
