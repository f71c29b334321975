"""What keeps a device or a server from beginning: one line each, with the way out."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from legolm import config as configs
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.client import Holdings, serve
from legolm.federate.transport.superlink import check_port
from legolm.plan import make_plan
from legolm.system import Helpers
from legolm.trust import CA, KEY, PUBLIC, make_authority, make_server, server_files


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., str]:
    """Why a device with this CA does not begin."""
    rows = tmp_path / "my.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')

    def start(ca: Path | None = None, data: Path = rows, server: str = "127.0.0.1:1") -> str:
        with pytest.raises(LegolmError) as caught:
            serve(server, ca, Holdings(tmp_path / "home", (str(data),)), print)
        return str(caught.value)

    return start


def test_a_device_says_what_it_lacks(begin: Callable[..., str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "no file" in begin(data=tmp_path / "none.jsonl") and not home.exists()
    assert f"no {CA}; get it from the server's owner" in begin()
    make_authority(tmp_path / "one")
    make_authority(tmp_path / "two")
    said = begin(tmp_path / "one" / CA)
    assert f"a key was made; give {home / PUBLIC} to the server's owner" in said and (home / KEY).exists()
    assert "is of another federation" in begin(tmp_path / "two" / CA)
    (home / CA).write_text("hello")
    assert "is no CA's certificate" in begin()
    (home / CA).write_bytes((tmp_path / "one" / CA).read_bytes())
    for port in ("http", "99999", "0"):
        assert "write it as HOST:PORT with a port of 1 to 65535" in begin(server=f"127.0.0.1:{port}")
    (home / KEY).write_text("hello")
    assert "is no private key" in begin()


def test_a_server_says_what_it_lacks(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "federation"
    raw = three_clients(tmp_path, ("dense",) * 3, evaluate={"scores": "own"})
    raw["federation"] |= {"engine": "deployment", "superlink": {"home": str(home)}}
    with pytest.raises(LegolmError, match="run: legolm certs init"):
        make_plan(configs.validate(RunConfig, raw, "test"))
    make_authority(home)
    make_server(home, ["localhost"])
    del raw["data"]["train"]  # nobody's rows are here
    plan = make_plan(configs.validate(RunConfig, raw, "test"))
    assert [one.examples for one in plan.clients] == [None] * 3
    monkeypatch.setattr("legolm.trust.authority.EARLIER", timedelta(days=-2))
    make_server(home, ["localhost"])
    with pytest.raises(LegolmError, match="look at this machine's clock"):
        server_files(home)
    for change, says in (
        ({"evaluate": {"scores": "everyone"}}, "set evaluate.scores to own"),
        ({"data": {"validation": "some.jsonl"}}, "is a share that each device holds out"),
    ):
        with pytest.raises(LegolmError, match=says):
            configs.validate(RunConfig, raw | change, "test")
    with pytest.raises(LegolmError, match="is for `address`"):
        configs.validate(RunConfig, {**raw, "federation": {"superlink": {"root_certificates": "x"}}}, "test")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legolm.federate.transport.superlink.ENDS_S", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LegolmError, match="to a free one"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(LegolmError, match="cannot be used"):
        check_port("192.0.2.1", 8000)


def test_helpers_end_with_their_children(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('begun', flush=True); time.sleep(60)"
    with Helpers(tmp_path, {"SOME": "thing"}) as helpers:
        helpers.start("one", [sys.executable, "-c", code])
        while not helpers.works("one") or "begun" not in helpers.log("one").read_text():
            time.sleep(0.05)
        # Other tests may have left some of their own in this process.
        mine = [one for one in psutil.Process().children(recursive=True) if "sleep" in " ".join(one.cmdline())]
        assert len(mine) == 2
        helpers.start("short", [sys.executable, "-c", "raise SystemExit(3)"])
        while helpers.ended("short") is None:
            time.sleep(0.05)
        assert helpers.ended("short") == 3 and not helpers.alive("short") and helpers.alive("one")
        with pytest.raises(LegolmError, match="cannot be started"):
            helpers.start("none", ["no-such-program"])
    assert not [one for one in mine if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    child = "import time; from legolm.federate.bridge.child import end_with_parent; end_with_parent(); time.sleep(90)"
    code = f"""
import os, subprocess, sys
env = os.environ | {{"LEGOLM_PARENT": str(os.getpid())}}
print(subprocess.Popen([sys.executable, "-c", {child!r}], env=env, stdout=subprocess.DEVNULL).pid)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid, end = int(done.stdout), time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
