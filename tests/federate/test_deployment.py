"""A real federation on this machine: TLS, a SuperLink, three devices with three blocks, and what goes wrong there."""

from __future__ import annotations

import http.server
import json
import random
import re
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from tap import Tap, found, secrets
from transformers import PreTrainedTokenizerFast

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.bridge import PIECE
from legolm.federate.client.door import Door
from legolm.report import read_status
from legolm.runs import Summary, read_live
from legolm.runs.kept import HASH_BYTES
from legolm.system import Progress, free_port
from legolm.trust import CA, KEY, add_device, make_authority, make_key, make_server, revoke_device

NAMES = ("fr", "de", "es")
PATIENCE_S = 1500
"""Of a busy machine: each message starts a process on the device."""


def until(what: Callable[[], Any]) -> Any:
    """What it gives, as soon as that is something."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.3)
    raise AssertionError("it did not come about")


class Devices:
    """Three registered devices with their CA, each a process of `legolm client` once it is started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.port = folder, folder / "federation", free_port()
        make_authority(self.home)
        make_server(self.home, ["127.0.0.1"])
        for name in NAMES:
            self.make(name)
        self.tap = Tap(self.home, self.port)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def make(self, name: str, register: bool = True, days: float | None = None) -> Path:
        device = self.folder / "devices" / name
        public = make_key(device)
        (device / CA).write_bytes((self.home / CA).read_bytes())
        if register:
            add_device(self.home, name, public, days)
        return device

    def start(self, *names: str) -> None:
        for name in names:
            command = [sys.executable, "-m", "legolm.cli", "client", "--server", f"127.0.0.1:{self.tap.port}"]
            command += ["--home", f"{self.folder}/devices/{name}", "--data", f"{self.folder}/data/{name}.jsonl"]
            with (self.folder / f"{name}.log").open("ab") as log:
                self._running[name] = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        for one in self._running.values():
            one.terminate()
        for one in self._running.values():
            one.wait(PATIENCE_S)
        self.tap.close()


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    found = Devices(tmp_path)
    yield found
    found.stop()


def deployed(raw: dict[str, Any], devices: Devices) -> RunConfig:
    """The same run on devices of their own: nobody tells the server where rows are."""
    superlink = {"home": str(devices.home), "host": "127.0.0.1", "port": devices.port}
    federation = raw["federation"] | {"engine": "deployment", "superlink": superlink}
    data = {name: value for name, value in raw["data"].items() if name != "train"}
    clients = [one | {"block": "auto"} if one["block"] == "dense" else one for one in raw["clients"]]  # the largest
    return configs.validate(RunConfig, raw | {"federation": federation, "data": data, "clients": clients}, "test")


class Plain(http.server.BaseHTTPRequestHandler):
    """A web server in the open."""

    def log_message(self, *args: object) -> None:
        return


def check_kept_out(devices: Devices) -> None:
    """Each in one sentence at the device; what the server's log says is checked at the end."""
    server, fr = f"127.0.0.1:{devices.port}", devices.folder / "devices" / "fr"
    devices.make("unknown", register=False)
    devices.make("late", days=1e-9)
    devices.make("gone")
    with Door(server, devices.home / CA, devices.folder / "devices" / "gone" / KEY) as door:
        assert door.hello()["name"] == "gone"
        revoke_device(devices.home, "gone")
        with pytest.raises(LegolmError, match="keeps this device out: the key of device 'gone' was revoked"):
            door.hello()
    for name, says in (("unknown", "its key is not registered"), ("late", "the key of device 'late' expired")):
        with Door(server, devices.home / CA, devices.folder / "devices" / name / KEY) as door:
            with pytest.raises(LegolmError, match=says):
                door.hello()
            with pytest.raises(LegolmError, match=says):
                door.piece("wide/config.json", 0)
    with Door(server, devices.home / CA, fr / KEY) as door:
        for path in ("../run.json", "wide/../../run.json", "wide/none", ""):
            with pytest.raises(LegolmError, match="does not give"):
                door.piece(path, 0)
    make_authority(devices.folder / "other")
    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        for address, ca, says in (
            (f"localhost:{devices.port}", devices.home / CA, "its certificate is for another host"),
            (server, devices.folder / "other" / CA, "not of this device's CA"),
            (f"127.0.0.1:{web.server_port}", devices.home / CA, "speaks no TLS"),
        ):
            with Door(address, ca, fr / KEY) as door, pytest.raises(LegolmError, match=says):
                door.hello()
        web.shutdown()


def end_server_app() -> None:
    """SIGKILL Flower's ServerApp."""

    def is_it(process: psutil.Process) -> bool:
        try:
            return "flwr-serverapp" in " ".join(process.cmdline())
        except psutil.Error:  # it ended meanwhile
            return False

    def found() -> list[psutil.Process]:
        return [one for one in psutil.Process().children(recursive=True) if is_it(one)]

    for one in until(found):
        one.kill()


def write_secrets(folder: Path, tokenizer: PreTrainedTokenizerFast) -> set[bytes]:
    """Rows of nothing but chance for each client; every eight tokens of them, in any form."""
    draw, wanted = random.Random(5), set[bytes]()
    for name in NAMES:
        rows = [["".join(draw.choices(string.ascii_letters, k=count)) for count in (24, 16)] for _ in range(20)]
        lines = [json.dumps({"instruction": asked, "output": said}) + "\n" for asked, said in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        for text in (text for row in rows for text in row):
            wanted |= set(secrets(tokenizer.encode(text), text))
    return wanted


def check_own_data_only(devices: Devices, out: Path, wanted: set[bytes]) -> None:
    """Nothing of the rows is in what passed, what the run keeps and what anybody logged; all that was said is there."""
    one = min(wanted)
    assert found(b"some" + one + b"other", wanted) == [one]
    up, down = b"\0".join(devices.tap.up), b"\0".join(devices.tap.down)
    replies = [path.read_bytes()[HASH_BYTES:] for path in devices.folder.glob("devices/*/runs/*/replies/[!.]*")]
    assert len(replies) == 3 * len(NAMES) and all(reply in up for reply in replies)  # the tap has seen everything
    weights = (out / "blocks" / "half" / "model.safetensors").read_bytes()
    assert weights[:PIECE] in down
    kept = [path for path in out.rglob("*") if path.is_file()]
    logs = [*devices.folder.glob("*.log"), *devices.folder.glob("devices/*/flower/**/*.log")]
    assert len(logs) >= 2 * len(NAMES) and (out / "report.html") in kept
    for content in (up, down, *(path.read_bytes() for path in [*kept, *logs])):
        assert not found(content, wanted)


def test_a_federation(
    three_clients: Callable[..., dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    devices: Devices,
    tmp_path: Path,
) -> None:
    """It ends where the local engine ends, whoever is kept out, killed or late meanwhile; no row leaves a device."""
    raw = three_clients(tmp_path, ("wide", "half", "dense"), evaluate={"scores": "own", "local_only": False})
    raw["federation"]["rounds"] = 1
    wanted_nowhere = write_secrets(tmp_path / "data", tokenizer)
    out, said, ended = tmp_path / "out", StringIO(), list[Summary | BaseException]()

    def run() -> None:
        try:
            progress = Progress(Console(file=said, width=200))
            ended.append(pipeline.run(deployed(raw, devices), out, progress=progress, models=False))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    devices.start("de", "es")
    until(lambda: "this device is 'es'" in devices.log("es"))
    check_kept_out(devices)
    until(lambda: "evaluate: answered" in devices.log("es"))
    devices.kill("es")
    end_server_app()
    devices.start("es", "fr")
    thread.join(PATIENCE_S)
    (summary,) = ended
    assert isinstance(summary, Summary), summary

    wanted = pipeline.run(configs.validate(RunConfig, raw, "test"), tmp_path / "local", models=False)
    assert summary.history[-1].accepted == list(NAMES) and not summary.history[-1].refused
    for ours, theirs in zip(summary.history, wanted.history, strict=True):
        assert ours.validation == pytest.approx(theirs.validation, rel=1e-6)
    for name in NAMES:  # nobody did anything twice, and each fetched one block
        assert len(re.findall("train: answered", devices.log(name))) == 1
        assert len(re.findall("evaluate: answered", devices.log(name))) == 2
        assert len(set(re.findall("block .*: .* MB to fetch", devices.log(name)))) == 1
    assert "block dense: is the largest that fits this device" in devices.log("es")  # which the config left open
    log = (out / "flower" / "superlink.log").read_text()
    for reason in ("its key is not registered", "'late' expired", "'gone' was revoked"):
        assert f"kept out 127.0.0.1: {reason}" in log or f"kept out 127.0.0.1: the key of device {reason}" in log
    assert not (out / "replies").exists()
    status = read_status(out)
    assert status["finished"] and status["rounds_done"] == 1 and set(read_live(out).root) == set(NAMES)
    assert {one["updates"] for one in status["clients"].values()} == {1}
    check_own_data_only(devices, out, wanted_nowhere)
