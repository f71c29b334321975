"""What a start of the command brings along: only what it needs, since imports are most of a plan's time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WATCHED = ("torch", "transformers", "transformers.modeling_utils", "peft", "flwr", "matplotlib", "scipy", "sklearn")


def brought(code: str) -> set[str]:
    """Those of `WATCHED` that a fresh process has after the code."""
    end = f"print(*(name for name in {WATCHED} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}\n{end}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def command(*arguments: str) -> str:
    call = f"sys.argv = {['legolm', *arguments]}\nfrom legolm.cli import main"
    return f"{call}\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code"


@pytest.mark.parametrize("code", ["import legolm", command("--help"), command("run", "--help")])
def test_import_and_help_bring_nothing_heavy(code: str) -> None:
    assert brought(code) == set()


def test_its_end_looks_for_no_garbage() -> None:
    at_end = "import atexit, gc\natexit.register(lambda: print(gc.get_freeze_count()))"
    code = f"import sys\n{at_end}\n{command('--version')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 1000


def test_flowers_processes_on_a_device_and_a_server_bring_no_model() -> None:
    """A device has small ones beside its resident process, whose memory is for training."""
    apps = [f"legolm.federate.bridge.{name}" for name in ("node", "client_app", "server_app", "guard")]
    assert brought(f"import {', '.join(apps)}") == {"flwr"}


def test_a_device_needs_no_package_of_a_simulation() -> None:
    absent = ("ray", "pandas", "datasets", "matplotlib", "pyarrow")
    gone = f"sys.modules.update(dict.fromkeys({absent}))\n"  # importing them raises then
    brought(f"{gone}from legolm.federate.client import ClientRuntime, Resident\nimport legolm.federate.client.device")


# transformers' models too: whether the weights are the config's is asked of the model, made without memory.
def test_a_dry_run_brings_no_more_than_it_reads_with(tiny: Callable[[str], Path], corpus: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}", "output": "ab"} for i in range(20)]
    (tmp_path / "fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"text": str(corpus), "samples": 4, "length": 64}
    block = {"name": "a", "method": "structured", "sparsity": 0.5, "calibration": text}
    raw = {"model": str(tiny("llama")), "data": {"train": str(tmp_path / "fr.jsonl")}, "blocks": [block]}
    (tmp_path / "run.yaml").write_text(json.dumps(raw | {"clients": [{"id": "fr", "block": "a"}]}))
    assert brought(command("run", str(tmp_path / "run.yaml"), "--dry-run")) <= {
        "torch",
        "transformers",
        "transformers.modeling_utils",
        "scipy",
    }
