"""The command in this process, and what bad input must look like."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from legolm import config as configs
from legolm.cli import main
from legolm.config import RunConfig
from legolm.data import client_data, render
from legolm.evaluation import score
from legolm.models import load_model, load_tokenizer

PAIRS = {
    "paris": [(f"Say {i}", "ab"[i % 2] * 2) for i in range(20)],
    "rome": [(f"Say {i}", "cd"[i % 2] * 2) for i in range(14)],
}
"""Questions and answers of two clients."""


def no_figure(*_: object) -> str:
    """In the place of `report.plots._svg`."""
    return "<svg></svg>"


def legolm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What the command's entry point does in this process: starting one for each call takes most of a minute."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(errors),
        patch.object(sys, "argv", ["legolm", *map(str, arguments)]),
        warnings.catch_warnings(),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def forked(action: Callable[[], object], errors: Path | None = None) -> int:
    """The id of a process that does this and ends, with what it says of errors in a file.

    It is forked: a new interpreter would import for seconds.
    """
    if pid := os.fork():
        return pid
    code: object = 3
    try:
        signal.alarm(300)
        torch.set_num_threads(1)
        if errors is not None:
            sys.stderr = errors.open("w", buffering=1)
        action()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 3)


def command(*arguments: object) -> None:
    """The command's entry point, for a process that is `forked`."""
    sys.argv = ["legolm", *map(str, arguments)]
    main()


def ended(pid: int) -> int:
    """The exit code of a process that was `forked`, once it has ended; of a signal, its number below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_there(pid: int) -> bool:
    """Whether a process that was `forked` works still."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def assert_one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


def without_clocks(value: Any) -> Any:
    """What must be equal between two runs: everything but time, the machine and the engine's name."""
    clocks = {"seconds", "wall_s", "machine", "engine", "run", "run_id", "versions", "train_s_per_round", "file_bytes"}
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in clocks}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def load(raw: dict[str, Any], tmp_path: Path, *overrides: str) -> RunConfig:
    """The run that `raw` describes, written to a file and read."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    return configs.load(path, list(overrides))


def validation_loss(model: Path, config: RunConfig, client: str) -> float:
    """Of the finished model in this folder on a client's validation data."""
    tokenizer = load_tokenizer(model)
    rows = [render(row, tokenizer, 512) for row in client_data(config)[client].validation]
    return score(load_model(model, torch.float32), rows, 8, "fp32").loss
