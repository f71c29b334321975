"""The script for a GPU, small and on the CPU: it runs to its last line, and it notices what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_checks")


def test_a_small_run_ends_with_right_checks_and_a_row_of_each_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed is measured in processes of their own; what checks is in this one, which has imported everything."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    apart = gpu.lines

    def lines(part: str, limit: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
        if part != "checks":
            yield from apart(part, limit, options)
            return
        said: list[dict[str, Any]] = []
        monkeypatch.setattr(gpu, "say", lambda **line: said.append(line))
        gpu.checks("cpu", True)
        yield from json.loads(json.dumps(said))

    monkeypatch.setattr(gpu, "lines", lines)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--small", "--device", "cpu"])
    gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["device"] == "cpu"
    assert not found["errors"]
    wrong = [check for check in found["checks"] if not check["ok"]]
    assert found["ok"], wrong
    names = {check["name"] for check in found["checks"]}
    assert names >= {"fit_packed", "fit_masked_bf16", "cut_structured", "cut_sparsegpt", "merge_bf16", "score_fp32"}
    for check in found["checks"]:
        assert check["rel"] <= check["tolerance"]
        # The device is the CPU: in float32 it must agree with itself, and in bfloat16 it cannot.
        other = check["name"].endswith("bf16") or check["name"] == "fit_dropout"
        assert (check["rel"] > 0) == other, check

    ours = [row for row in found["rows"] if row["tool"] == "legolm"]
    assert [row["block"] for row in ours] == ["dense", "half"]
    # Attention 2 · 64² + 2 · 64 · 32 weights a layer, the MLP 3 · 64 · 128, and half of that.
    assert [row["weights_kept"] for row in ours] == [1.0, round((12_288 + 12_288) / (12_288 + 24_576), 3)]
    assert all(row["tokens_per_s"] > 0 and row["peak_mb"] is None for row in ours)
    if importlib.util.find_spec("trl") is None:
        assert "trl not installed" in found["left_out"]["trl"]
        assert ours[0]["speed_over_trl"] is None
    else:
        assert ours[0]["speed_over_trl"] > 0


def test_figures_that_differ_too_much_or_are_not_finite_are_not_ok(checks: ModuleType) -> None:
    wanted = torch.tensor([3.0, 4.0])  # of norm 5
    found = checks.compared(torch.tensor([3.0, 4.5]), wanted, 0.1)
    assert (found["max_abs"], found["rel"], found["ok"]) == (0.5, 0.1, True)
    assert not checks.compared(torch.tensor([3.0, 4.5]), wanted, 0.09)["ok"]
    assert not checks.compared(torch.tensor([3.0, float("nan")]), wanted, 0.1)["ok"]


def test_a_merge_is_measured_in_last_places_of_bfloat16(checks: ModuleType) -> None:
    # Above 1 bfloat16 goes in steps of 1/128, above 2 of 1/64, below 1 of 1/256.
    exact = torch.tensor([1.0, 3.0, -0.75, 0.0])
    got = exact + torch.tensor([1 / 256, -1 / 64, 1 / 1024, 0.0])
    assert checks.places_off(got, exact).tolist() == [0.5, -1.0, 0.25, 0.0]


def test_ratios_are_over_trl_of_the_same_shape_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    rows = [
        {"shape": "s", "block": "dense", "tool": "legolm", "tokens_per_s": 300.0, "peak_mb": 100},
        {"shape": "s", "block": "half", "tool": "legolm", "tokens_per_s": 500.0, "peak_mb": 80},
        {"shape": "s", "block": "dense", "tool": "trl", "tokens_per_s": 100.0, "peak_mb": 400},
        {"shape": "s", "block": "half", "tool": "trl", "error": "OutOfMemoryError"},
    ]
    gpu.compare_with_trl(rows)
    assert [row["speed_over_trl"] for row in rows] == [3.0, None, 1.0, None]
    assert [row["memory_over_trl"] for row in rows] == [0.25, None, 1.0, None]
