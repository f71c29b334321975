"""The results page says what its records say."""

from __future__ import annotations

import importlib
from pathlib import Path

import matplotlib
import pytest

HERE = Path(__file__).parents[2]


def test_the_page_is_what_its_records_give(tmp_path: Path) -> None:
    benchmarks, docs = HERE / "benchmarks", HERE / "docs"
    with pytest.MonkeyPatch.context() as patched, matplotlib.rc_context():
        patched.syspath_prepend(str(benchmarks))
        results = importlib.import_module("results")
        results.write(docs / "results" / "records", tmp_path, "", benchmarks / "results_notes.md")
    again = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".svg"]
    assert {path: (docs / path).read_bytes() for path in again} == {
        path: (tmp_path / path).read_bytes() for path in again
    }
