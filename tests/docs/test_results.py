"""The results page says what its records say."""

from __future__ import annotations

import importlib
import json
import re
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


SHOWN = {
    "HeteAgg (frozen side, the default": "heteagg_frozen_side",
    "HeteAgg, blocks cut by the clients' own sums": "heteagg_sums",
    "the same in sketches": "heteagg_near",
    "blocks with as many weights": "heteagg_masks",
    "FedPruner": "fedpruner",
    "FedRolex": "fedrolex",
    "HeteroFL": "heterofl",
    "Fed-HeLLo": "fedhello",
    "FedIT with the clients that can hold the LLM": "fedit_capable",
    "FedIT with everyone dense": "fedit_everyone",
    "FedIT of rank 4": "fedit_rank_4",
    "HeteAgg with everyone dense": "heteagg_dense",
}
"""How the README's table calls the schemes."""


def test_the_readme_shows_what_was_measured() -> None:
    main = json.loads((HERE / "docs/results.json").read_text())["main"]
    page = (HERE / "docs/results.md").read_text().partition("## Every scheme: dates, a language a client\n")[2]
    readme = (HERE / "README.md").read_text().partition("## What it brings\n")[2]
    for called, scheme in SHOWN.items():
        (row,) = re.findall(rf"^\| {re.escape(called)}.*$", readme, re.MULTILINE)
        _, _, loss, exact, size, _, seeds, _ = (cell.strip() for cell in row.split("|"))
        found = main[scheme]
        # From the page, not from what is rounded to four digits: it would be rounded twice.
        assert re.search(rf"^\| \W*{scheme}\W* \| {re.escape(loss)} \|", page, re.MULTILINE), called
        assert (exact, seeds) == (f"{100 * found['accuracy']:.0f} %", str(len(found["seeds"]))), called
        assert size.startswith(f"{found['bytes'] / 1e6:.1f} MB"), called
