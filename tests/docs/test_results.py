"""The results page says what its records say."""

from __future__ import annotations

import importlib
from pathlib import Path

import matplotlib
import pytest

HERE = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["results.md", "results.json"])
def test_the_page_is_what_its_records_give(name: str, made_again: Path) -> None:
    assert (made_again / name).read_text() == (HERE / "docs" / name).read_text()


def test_records_are_kept_whole(made_again: Path) -> None:
    kept, again = HERE / "docs" / "results" / "records", made_again / "results" / "records"
    files = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`docs` from `docs/results/records`."""
    out, benchmarks = tmp_path_factory.mktemp("docs"), HERE / "benchmarks"
    command = ["results.py", HERE / "docs" / "results" / "records", "--out", out]
    with pytest.MonkeyPatch.context() as patched, matplotlib.rc_context():
        patched.syspath_prepend(str(benchmarks))
        patched.setattr("sys.argv", [*map(str, command), "--notes", str(benchmarks / "results_notes.md")])
        importlib.import_module("results").main()
    return out
