"""The short version of benchmarks/fuzz.py, in this process; and that it sees what it looks for."""

from __future__ import annotations

import importlib
import resource
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INPUTS = 2500


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_nothing_breaks_the_readers(fuzz: ModuleType, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(0, tmp_path)
    found: list[dict[str, Any]] = [fuzzer.one(number) for number in range(INPUTS)]
    assert [one for one in found if one["outcome"] == "crash"] == []
    assert max(one["seconds"] for one in found) < 2
    assert max(one["mb"] for one in found) < 100
    outcomes = {kind: Counter(one["outcome"] for one in found if one["kind"] == kind) for kind in kinds(fuzzer)}
    assert all(one["refused"] for one in outcomes.values()), outcomes  # each kind's changes reach its reader


def test_valid_inputs_are_read(fuzz: ModuleType, tmp_path: Path) -> None:
    for kind in fuzz.Fuzzer(0, tmp_path)._kinds:
        for number, content in enumerate(kind.seeds):
            folder = tmp_path / f"{kind.name}-{number}"
            folder.mkdir()
            kind.read(content, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_sees_crashes_time_and_memory(fuzz: ModuleType, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(0, tmp_path)

    def read(content: bytes, folder: Path) -> None:
        held = bytearray(200_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        while resource.getrusage(resource.RUSAGE_SELF).ru_utime < before + 0.05:
            pass
        raise KeyError(len(held))

    fuzzer._kinds = [type(fuzzer._kinds[0])("mine", "text", [b"x"], read, 1)]
    fuzzer._weights = [1]
    found = fuzzer.one(0)
    assert (found["kind"], found["outcome"], found["error"]) == ("mine", "crash", "KeyError: 200000000")
    assert found["seconds"] >= 0.05
    assert found["mb"] > 100  # what else is freed meanwhile counts against it


def kinds(fuzzer: Any) -> list[str]:
    return [kind.name for kind in fuzzer._kinds]
