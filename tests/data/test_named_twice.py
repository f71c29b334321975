"""A file that is named twice: its rows could be trained on and tested on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from legolm.config import DataConfig
from legolm.data import load_parts, read_rows
from legolm.data.sources import check_apart, parts_of
from legolm.errors import LegolmError


def rows(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "output": f"a{i}"}) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize("again", ["fr.jsonl", "*.jsonl", "../data/fr.jsonl", "link.jsonl", "hard.jsonl"])
def test_in_one_source(tmp_path: Path, again: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = rows(folder / "fr.jsonl")
    if again.startswith("link"):
        (folder / again).symlink_to(path)
    if again.startswith("hard"):
        (folder / again).hardlink_to(path)
    config = DataConfig.model_validate({"train": [str(path), str(folder / again)], "split": {"by": "iid"}})
    with pytest.raises(LegolmError, match=r"data.train: .* is named twice.*name it once"):
        load_parts(config, ["fr"], 0)


def test_in_two_sources(tmp_path: Path) -> None:
    path = rows(tmp_path / "fr.jsonl")
    config = DataConfig.model_validate({"train": str(path), "test": str(tmp_path / "f*.jsonl")})
    with pytest.raises(LegolmError, match=r"data.test: .*fr.jsonl is also in data.train.*hold out"):
        load_parts(config, ["fr"], 0)


def test_two_files_with_the_same_rows_are_two(tmp_path: Path) -> None:
    one, two = rows(tmp_path / "a.jsonl", 2), rows(tmp_path / "b.jsonl", 2)
    assert len(list(read_rows([str(one), str(two)], "data.train"))) == 4


def test_a_text_past_every_window_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fr.jsonl"
    path.write_text(json.dumps({"instruction": "q", "output": "x" * 1_000_001}) + "\n")
    with pytest.raises(LegolmError, match=r"fr.jsonl:1: `output` has 1000001 characters; at most 1000000"):
        load_parts(DataConfig(train=str(path)), ["fr"], 0)


@pytest.mark.parametrize(("name", "says"), [("loop.jsonl", "no file"), ("a\0b.jsonl", "null byte|no path|no file")])
def test_a_name_that_leads_nowhere_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for named in (str(tmp_path / name), [str(rows(tmp_path / "fr.jsonl")), str(tmp_path / name)]):
        with pytest.raises(LegolmError, match=says):
            load_parts(DataConfig(train=named), ["fr"], 0)


def test_a_split_of_a_hub_data_set_has_several_names() -> None:
    with pytest.raises(LegolmError, match="named twice"):
        parts_of(["hub:a/b", "hub:a/b:train"], "data.train")
    assert len(parts_of(["hub:a/b:train[:10%]", "hub:a/b:train[10%:]"], "data.train")) == 2
    check_apart("hub:a/b", "hub:a/b:test", "data.test")
    for other in ("hub:a/b:train", "hub:a/b:train[:10%]"):
        with pytest.raises(LegolmError, match=r"also in data.train"):
            check_apart("hub:a/b", other, "data.test")
