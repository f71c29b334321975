"""Runs side by side: no process outlives the command that started it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from legolm import config as configs
from legolm.data.files import BadRow
from legolm.errors import LegolmError, UnusableRoundError
from legolm.finetune.loop import Diverged
from legolm.study import compare

SCRIPT = """
import time
from concurrent.futures import ProcessPoolExecutor
from legolm.system import Spawning, end_with_parent

with ProcessPoolExecutor(2, Spawning(), end_with_parent) as pool:
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


def test_an_error_of_a_run_beside_comes_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its kind: one that is made of parts would come as the process's end."""
    module = sys.modules[compare.__module__]
    for error in (BadRow("rows.jsonl:3", "no answer", "mend it"), Diverged("lost", {}, {}), UnusableRoundError("none")):

        def fails(*given: Any, raised: LegolmError = error) -> None:
            raise raised

        monkeypatch.setattr(module, "_run_one", fails)
        with pytest.raises(LegolmError) as caught:
            module._run_beside(Path("x"), "x", SimpleNamespace(plugins=[]), None, Path("x"), False, "")
        there = pickle.loads(pickle.dumps(caught.value))
        assert str(there) == str(error)
        assert isinstance(there, UnusableRoundError) == isinstance(error, UnusableRoundError)


@pytest.fixture
def study(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    evaluate, federation = {"local_only": False, "others": 0}, {"engine": "local", "rounds": 1}
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate=evaluate, federation=federation)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"run": raw, "variants": [{"name": "a"}, {"name": "b"}]}))
    return path


def test_a_plain_script_is_not_run_again_by_its_runs(study: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import legolm as lg\nprint('begins')\nprint(lg.compare({str(study)!r}, 'out', models=False, jobs=2).name)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["begins", "study"], done.stderr


def test_what_only_the_script_has_is_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(configs.TRAINERS.entry("adamw"), module="__main__")
    monkeypatch.setitem(configs.TRAINERS._entries, "adamw", own)
    with pytest.raises(LegolmError, match="--jobs 2: trainer 'adamw' is defined in this script"):
        compare(study, tmp_path / "out", jobs=2)
