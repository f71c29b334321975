"""What Ray leaves behind: no process and no folder, also where a run in Flower's simulation is ended from outside.

That of a run that ends well, `test_pipeline` starts one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil


def of_ray(folder: str) -> list[str]:
    """Processes that know this folder, and so are of a session in it."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = [*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values()]
        if process.pid != os.getpid() and any(folder in word for word in words):
            found.append(" ".join(process.info["cmdline"] or ())[:80])
    return found


def test_nothing_is_left_of_a_session(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    raw["federation"] = {"engine": "flower", "rounds": 200}
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    out = tmp_path / "out"
    # A socket's path below it has to be short.
    with TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        command = [sys.executable, "-m", "legolm.cli", "run", str(tmp_path / "run.yaml"), "--out", str(out)]
        process = subprocess.Popen(
            command,
            env=os.environ | {"RAY_TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        seen = False
        while process.poll() is None and not (out / "rounds" / "0000").exists():
            seen = seen or any(Path(folder).iterdir())
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert seen
        assert process.returncode == 130, said
        assert not list(Path(folder).iterdir())
        deadline = time.monotonic() + 10  # a killed process takes its moment
        while (left := of_ray(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    assert said.splitlines()[-1].startswith("stopped: what is finished is kept")
    assert "Traceback" not in said
    assert not list(out.rglob("*.partial"))
