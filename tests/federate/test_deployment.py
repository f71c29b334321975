"""A real federation on this machine: TLS, a SuperLink, three devices, noisy sums of three blocks, and faults."""

from __future__ import annotations

import http.server
import json
import random
import re
import string
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from devices import LEGOLM, Devices
from devices import until as come_about
from rich.console import Console
from safetensors.torch import load_file
from tap import found, secrets
from transformers import PreTrainedTokenizerFast

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.bridge import PIECE
from legolm.federate.client.door import Door
from legolm.federate.client.fetch import UnreachableError
from legolm.federate.server import secure
from legolm.report import read_status
from legolm.runs import RoundRecord, Summary, read_live, read_stage
from legolm.runs.kept import HASH_BYTES
from legolm.system import Progress
from legolm.trust import CA, KEY, make_authority, revoke_device

NAMES = ("fr", "de", "es")
PATIENCE_S = 1500
"""Of a busy machine."""
NOISE = {"level": "client", "noise": "distributed", "noise_multiplier": 1e-4, "clip": 10.0}
"""Little enough to see what it is on."""


def until(what: Callable[[], Any]) -> Any:
    """What it gives, as soon as that is something."""
    return come_about(what, PATIENCE_S)


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    dying = (sys.executable, str(Path(__file__).with_name("dying.py")), str(tmp_path / "died"))
    found = Devices(tmp_path, NAMES, lambda name: dying if name == "es" else LEGOLM)
    yield found
    found.stop(PATIENCE_S)


def deployed(raw: dict[str, Any], devices: Devices) -> RunConfig:
    """The same run on devices of their own: nobody tells the server where rows are."""
    superlink = {"home": str(devices.home), "host": "127.0.0.1", "port": devices.port}
    federation = raw["federation"] | {"engine": "deployment", "superlink": superlink}
    data = {name: value for name, value in raw["data"].items() if name != "train"}
    clients = [one | {"block": "auto"} if one["block"] == "dense" else one for one in raw["clients"]]  # the largest
    return configs.validate(RunConfig, raw | {"federation": federation, "data": data, "clients": clients}, "test")


class HourAgo(datetime):
    """A clock that is wrong."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) - timedelta(hours=1)


class Plain(http.server.BaseHTTPRequestHandler):
    """A web server in the open."""

    def log_message(self, *args: object) -> None:
        return


def check_kept_out(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with monkeypatch.context() as wrong, pytest.raises(UnreachableError, match="its clock differs by 3600 s"):
            wrong.setattr("legolm.federate.client.door.datetime", HourAgo)  # a device that waits until it is right
            door.hello()
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
    # Two evaluations, two times keys and shares, updates, of the second sum signatures and shares that open it.
    assert len(replies) == len(NAMES) * (2 + 4 + 2 + 2) - 1
    assert all(reply in up for reply in replies)  # the tap has seen everything
    weights = (out / "blocks" / "half" / "model.safetensors").read_bytes()
    assert weights[:PIECE] in down
    kept = [path for path in out.rglob("*") if path.is_file()]
    logs = [*devices.folder.glob("*.log"), *devices.folder.glob("devices/*/flower/**/*.log")]
    assert len(logs) >= 2 * len(NAMES) and (out / "report.html") in kept
    for content in (up, down, *(path.read_bytes() for path in [*kept, *logs])):
        assert not found(content, wanted)


def check_noisy_sum(out: Path, local: Path) -> None:
    """What all three hold is what the local engine's sum is but for the noise; the rest is as it was."""
    states = [load_file(one / "adapter.safetensors") for one in (out / "rounds/0000", out / "rounds/0001", local)]
    before, ours, theirs = (torch.cat([state[key].flatten() for key in states[0]]) for state in states)
    for path in (out / "rounds/0001", local):
        record = read_stage(path)
        assert isinstance(record, RoundRecord) and record.closed == pytest.approx(0.7)
    moved = ours != before
    assert int(moved.sum()) > 1000
    assert int((moved != (theirs != before)).sum()) < 10  # noise may leave one where it was
    noise = (ours - theirs)[moved]
    # Three parts of 1e-3 / √2, any two of which are enough, in a mean of three.
    assert float(noise.square().mean().sqrt()) == pytest.approx(1e-3 * 1.5**0.5 / 3, rel=0.15)
    assert abs(float(noise.mean())) < 1e-4


def test_a_federation(
    three_clients: Callable[..., dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    devices: Devices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends where the local engine does but for noise, whoever is kept out, killed or late; no row leaves a device.

    A device is killed in mid-round: all three are needed for a sum, and when it is back they are asked for another one.
    """
    raw = three_clients(tmp_path, ("wide", "half", "dense"), evaluate={"scores": "own", "local_only": False})
    raw["federation"]["rounds"], raw["aggregate"] = 1, {"weight": "equal"}
    sums = raw | {"privacy": {"secure": {"withheld_limit": 1}}}
    monkeypatch.setattr(secure, "AGAIN_S", 0)
    wanted_nowhere = write_secrets(tmp_path / "data", tokenizer)
    out, said, ended = tmp_path / "out", StringIO(), list[Summary | BaseException]()

    def run() -> None:
        try:
            progress = Progress(Console(file=said, width=200))
            noisy = sums | {"privacy": sums["privacy"] | {"dp": NOISE}}
            ended.append(pipeline.run(deployed(noisy, devices), out, progress=progress, models=False))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    devices.start("de", "es")
    until(lambda: "this device is 'es'" in devices.log("es"))
    check_kept_out(devices, monkeypatch)
    until(lambda: "evaluate: answered" in devices.log("es"))
    end_server_app()
    devices.start("fr")
    until(lambda: not devices.alive("es"))
    devices.start("es")
    thread.join(PATIENCE_S)
    (summary,) = ended
    assert isinstance(summary, Summary), summary

    wanted = pipeline.run(configs.validate(RunConfig, sums, "test"), tmp_path / "local", models=False)
    assert summary.history[-1].accepted == list(NAMES) and not summary.history[-1].refused
    for ours, theirs in zip(summary.history, wanted.history, strict=True):
        assert ours.validation == pytest.approx(theirs.validation, rel=1e-2)
    check_noisy_sum(out, tmp_path / "local" / "rounds" / "0001")
    assert "round 1: all are asked anew (" in said.getvalue()
    for name in NAMES:  # nobody did anything twice but for the second sum, and each fetched one block
        assert len(re.findall("train: answered", devices.log(name))) == (1 if name == "es" else 2)
        assert len(re.findall("evaluate: answered", devices.log(name))) == 2
        assert len(set(re.findall("block .*: .* MB to fetch", devices.log(name)))) == 1
        # Flower's own command, which imports all for each message.
        assert "flwr-clientapp" not in (devices.device(name) / "flower" / "node.log").read_text()
    assert "block dense: is the largest that fits this device" in devices.log("es")  # which the config left open
    log = (out / "flower" / "superlink.log").read_text()
    for reason in ("its key is not registered", "'late' expired", "'gone' was revoked"):
        assert f"kept out 127.0.0.1: {reason}" in log or f"kept out 127.0.0.1: the key of device {reason}" in log
    assert not (out / "replies").exists()
    status = read_status(out)
    assert status["finished"] and status["rounds_done"] == 1 and set(read_live(out).root) == set(NAMES)
    assert {one["updates"] for one in status["clients"].values()} == {1}
    check_own_data_only(devices, out, wanted_nowhere)
