"""The command in this process, and what bad input must look like."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import patch

from legolm.cli import main


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
