"""A run in Flower's simulation: three blocks, secure sums with noise and a client killed in mid-round; and ended
from outside, it leaves no process and no folder of Ray.

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
import pytest
import torch
from safetensors.torch import load_file

from legolm.block import read_block
from legolm.privacy import gaussian_epsilon
from legolm.runs import RoundRecord, read_stage

KILLED = """
import os, signal
from legolm.finetune import Task, fit, trainer

@trainer("killed")
def killed(task: Task):
    if len(task.coverage.layers) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(task)
"""
"""The process that works for the client of the smallest block ends so, each time that it trains."""


def of_ray(folder: str) -> list[str]:
    """Processes that know this folder, and so are of a session in it."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = [*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values()]
        if process.pid != os.getpid() and any(folder in word for word in words):
            found.append(" ".join(process.info["cmdline"] or ())[:80])
    return found


def check_round(out: Path) -> None:
    """What three of four clients added up to is there with its noise, of the entries that all three hold; `es` left."""
    record = read_stage(out / "rounds" / "0001")
    assert isinstance(record, RoundRecord)
    assert record.accepted == ["fr", "de", "it"]
    ((client, reason),) = [(one.client, one.reason) for one in record.refused]
    assert client == "es"
    assert reason.startswith("its process was killed")
    assert record.privacy is not None
    assert record.privacy.epsilon == pytest.approx(gaussian_epsilon([4.0], 1e-5))
    before, after = (load_file(out / "rounds" / number / "adapter.safetensors") for number in ("0000", "0001"))
    moved = {key: after[key] - before[key] for key in before if key.endswith("up_proj.B")}
    layers = read_block(out / "blocks" / "half").coverage.layers
    wide = read_block(out / "blocks" / "wide").coverage
    for layer, kept in enumerate(wide.neurons):
        found, there = moved[f"layers.{layer}.mlp.up_proj.B"], torch.zeros(len(moved["layers.0.mlp.up_proj.B"]))
        there[list(kept)] = 1
        assert torch.equal((found != 0).any(1), there.bool()), layer
        # One may go and one may tell: of three or four holders two parts have all of 4 * 1e-3. Four were asked.
        expected = 4e-3 * 1.5**0.5 / (4 if layer in layers else 3)
        assert float(found[there.bool()].square().mean().sqrt()) == pytest.approx(expected, rel=0.5)


def test_a_round_of_noisy_sums_and_nothing_is_left_of_a_session(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    evaluate = {"local_only": False, "others": 0, "every": 200}
    raw = three_clients(tmp_path, ("dense", "wide", "half"), rows=10, evaluate=evaluate)
    raw["clients"].append({"id": "it", "data": "fr", "block": "dense"})
    for block in raw["blocks"][1:]:
        block["recover"] = {"steps": 0}
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}
    raw["federation"] = {"engine": "flower", "rounds": 200}
    raw["aggregate"], raw["plugins"] = {"weight": "equal"}, ["mine:killed"]
    raw["train"] |= {"steps": 1, "trainer": "killed"}
    noise = {"level": "client", "noise": "distributed", "noise_multiplier": 4.0, "clip": 1e-3, "dropouts": 1}
    raw["privacy"] = {"secure": {"withheld_limit": 1}, "dp": noise}
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    (tmp_path / "mine.py").write_text(KILLED)
    out = tmp_path / "out"
    # A socket's path below it has to be short.
    with TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        command = [sys.executable, "-m", "legolm.cli", "run", str(tmp_path / "run.yaml"), "--out", str(out)]
        process = subprocess.Popen(
            command,
            env=os.environ | {"RAY_TMPDIR": folder},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        seen = False
        while process.poll() is None and not (out / "rounds" / "0001").exists():
            seen = seen or any(Path(folder).iterdir())
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=600)[1]
        assert seen
        assert process.returncode == 130, said
        assert not list(Path(folder).iterdir())
        deadline = time.monotonic() + 10  # a killed process takes its moment
        while (left := of_ray(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []
    check_round(out)
    assert said.splitlines()[-1].startswith("stopped: what is finished is kept")
    assert "Traceback" not in said
    assert not list(out.rglob("*.partial"))
