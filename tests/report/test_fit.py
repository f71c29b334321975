"""Tables and answers in a terminal: whatever is in them, nothing is wider than it and nothing of a table is lost."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from legolm.report import fit
from legolm.report.fit import fitted, print_table, shortened
from legolm.report.terminal import print_answers

WORDS = st.text("abc ", max_size=40).map(str.strip)
NUMBERS = st.text("0123456789.", max_size=12)


def drawn(columns: list[str], rows: list[list[str]], width: int, keys: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=50)
    for table in fitted(columns, rows, width, keys):
        console.print(table)
    return out.getvalue()


@given(data=st.data(), width=st.sampled_from([60, 80, 200]))
def test_a_table_fits_and_keeps_all_its_cells(data: Any, width: int) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=1, max_size=14))
    columns = ["name", *(f"{'>' * number}of column {i}" for i, number in enumerate(right))]
    row = st.tuples(st.text("xyz", min_size=1, max_size=30), *(NUMBERS if number else WORDS for number in right))
    rows = [list(one) for one in data.draw(st.lists(row, min_size=1, max_size=4))]
    shown = drawn(columns, rows, width, 1)
    assert max(map(len, shown.splitlines())) <= width
    for i, number in enumerate(right, 1):
        for one in rows:
            if number:
                assert one[i] in shown  # a number is never folded
    assert shown.replace("\n", "").count("name") == len(fitted(columns, rows, width, 1))


def test_empty_columns_are_left_out_and_the_rest_goes_below_with_the_rows_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(("client", ">one", ">two", ">three"), [("fr", "1234567", "", "1234567"), ("[red]", "1", "", "2")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["client", "one"], ["fr", "1234567"], ["[red]", "1"],
        [],
        ["client", "three"], ["fr", "1234567"], ["[red]", "2"],
    ]  # fmt: skip


def test_heads_are_folded_only_where_they_must(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", ">a long head"), [("x", "1")])
    assert capsys.readouterr().out.splitlines() == ["a  a long head", "x            1"]
    assert fit.fitted(("a", ">a long head"), [("x", "1")], 10)[0].columns[1].width == 4


def test_answers_are_one_line_each_without_control_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_answers("fr", "Which\nday? \x1b[2J", "ja", {"the LLM": "ja ", "x" * 60: "[bold]" + "名" * 60})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fr: Which day? [2J"
    assert lines[1].split() == ["wanted", "ja"] and lines[2].split() == ["✓", "the", "LLM", "ja"]
    assert lines[3].endswith("…") and "…  [bold]名" in lines[3] and cell_len(lines[3]) <= 40
    assert shortened("short", 5) == "short" and shortened("longer", 5) == "long…"
