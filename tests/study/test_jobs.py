"""Runs side by side: no process outlives the command that started it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from legolm.system import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), end_with_parent) as pool:
        running = [pool.submit(time.sleep, 60) for _ in range(2)]
        while not all(one.running() for one in running):
            time.sleep(0.01)
        print("running", flush=True)
"""


def test_a_killed_command_leaves_no_run_behind(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    workers = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in str(one.cmdline())
    ]
    assert len(workers) == 2
    time.sleep(1)  # until they are past their start
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, 10)
    assert not alive
