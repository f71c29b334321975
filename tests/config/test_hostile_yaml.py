"""Config files that would cost time or memory, or say two things at once: one line that names the place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import assert_one_line, legolm
from legolm.config import load, read
from legolm.config.file import override_all
from legolm.errors import LegolmError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\ntrain: {steps: 2}\nseed: 2\n", ":3: not valid YAML \\('seed' is given twice; take one out\\)"),
        ("train:\n  steps: 2\n  rate: 1\n  steps: 3\n", ":4: not valid YAML \\('steps' is given twice"),
        ("train: {learning_rate: 0.002,2}", "the key '2' is no word; mend it, or put it in quotes"),
        ("train: {yes: 1}", "the key 'yes' is no word"),
        (f"plugins: [{'a, ' * 80_000}]", "it has more than 75000 values"),
        (BOMB, "with its aliases written out it has more than 4000000 characters"),
        ("a: &a [*a]\n", ":1: not valid YAML \\(it contains itself\\)"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("seed: 2026-02-31\n", "not valid YAML \\(a value cannot be read: day is out of range"),
        ("seed: " + "9" * 5000, "not valid YAML \\(a value cannot be read: Exceeds the limit"),
        *((f"seed: !!{tag}\n", "not valid YAML \\(a value") for tag in ("bool x", "timestamp x", "int ''", "float ''")),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML"),
    ],
)
def test_is_refused_in_one_line_that_names_the_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(LegolmError, match=says) as caught:
        read(path)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# " + "x" * 17_000_000)
    with pytest.raises(LegolmError, match="has more than the 16000000 bytes that are read"):
        read(path)


def test_a_long_value_is_shown_by_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\nseed: [{'x, ' * 20_000}]\n")
    with pytest.raises(LegolmError, match=r"`seed` = \['x', .*characters\)") as caught:
        load(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_number_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: [0x{'f' * 5000}]\n")
    with pytest.raises(LegolmError, match="`model` = a number of thousands of digits"):
        load(path)


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    found = read(path)
    assert found["b"] == {"x": 1, "y": 3}
    assert found["c"] == [{"x": 1, "y": 2}] * 2


def test_an_override_is_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\n")
    with pytest.raises(LegolmError, match="is given twice"):
        load(path, ["train={steps: 1, steps: 2}"])
    result = legolm("run", str(path), "--set", "train=" + "[" * 5000 + "]" * 5000, "--dry-run")
    assert_one_line(result, "nested too deep")
    for change, says in (
        ("data.train.0.x=1", "data.train.0 is a value and has no fields"),
        (f"data.train.{'9' * 5000}=1", "must be an index from 0 to 0"),
    ):
        path.write_text("data: {train: [a]}\n")
        with pytest.raises(LegolmError, match=f"^--set .*{says}") as caught:
            load(path, [change])
        assert len(str(caught.value)) < 1000


def test_an_override_of_an_alias_is_none_of_its_anchor(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: [1]}\nb: *a\n")
    found = read(path)
    override_all(found, ["a.x.0=2"])
    assert found == {"a": {"x": [2]}, "b": {"x": [1]}}


def test_a_device_or_a_pipe_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(LegolmError, match=f"{name}: cannot be read .*is no regular file"):
            load(tmp_path / name)
