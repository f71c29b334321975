"""Atomic writes: whole or not at all, also on a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from legolm import config as configs
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.runs import RunDir, load_adapter_state, save_adapter_state
from legolm.system import (
    LOCK,
    DiskFullError,
    atomic_folder,
    atomic_write,
    check_room,
    held_bytes,
    locked,
    read_json,
    scratch_folder,
    writing,
)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()  # an empty one is free
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a", "file", "link"):
        with pytest.raises(LegolmError, match=f"{name}: is already there"), atomic_folder(tmp_path / name):
            raise AssertionError("before the work")
    with pytest.raises(LegolmError, match="b: is already there"), atomic_folder(tmp_path / "b"):
        (tmp_path / "b").write_text("theirs, made meanwhile")
    with pytest.raises(LegolmError, match="cannot be made there"), atomic_folder(tmp_path / ("a" * 300)):
        raise AssertionError("before the work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file", "link"]
    assert (tmp_path / "a" / "thesis").read_text() == "mine"


def test_a_scratch_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert folder.parent == tmp_path and not (tmp_path / "a").exists()
    with pytest.raises(KeyError), scratch_folder(tmp_path / "a"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(small_disk: Path) -> None:
    atomic_write(small_disk / "old", "as it was")
    with pytest.raises(LegolmError, match="the disk is full; free some space and run the command again"):
        atomic_write(small_disk / "old", "x" * 100_000)
    with pytest.raises(LegolmError, match="the disk is full"), atomic_folder(small_disk / "folder") as folder:
        save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors")
    with pytest.raises(LegolmError, match="the disk is full"), scratch_folder(small_disk / "folder") as folder:
        save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors")
    assert (small_disk / "old").read_text() == "as it was"
    assert [path.name for path in small_disk.iterdir()] == ["old"]


def test_nothing_is_begun_on_a_full_disk(full_disk: Path) -> None:
    with pytest.raises(DiskFullError, match=r"\.lock: the disk is full; free some space"), locked(full_disk / "a"):
        raise AssertionError("before the work")
    with pytest.raises(DiskFullError, match="a: the disk is full; free some space or give another --home"):
        check_room(full_disk / "a", field="--home")
    there = full_disk / "filler"
    with pytest.raises(DiskFullError, match="r: the disk is full"), writing(there), there.open("a") as lines:
        lines.write("1")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


def test_what_another_user_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that all share: it cannot be looked at."""
    (tmp_path / ".a.0a1b2c3d.partial").mkdir(mode=0)
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # root may look at all
    try:
        with scratch_folder(Path("a")) as folder:
            (folder / "x").write_text("1")
    finally:
        os.seteuid(user)
    assert [path.name for path in tmp_path.iterdir()] == [".a.0a1b2c3d.partial"]


def test_room_is_asked_for_what_is_not_there_yet(small_disk: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    (run / "block").write_bytes(bytes(40_000))
    os.link(run / "block", run / "same block")
    check_room(run, 60_000 - held_bytes(run))  # 40,000 are there, 24,000 are free
    with pytest.raises(LegolmError, match=r"run: needs 0.0 GB and the disk has 0.0 GB; free some space"):
        check_room(run, 80_000 - held_bytes(run))


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"llm": {}}')
    assert read_json(tmp_path / "summary.json", "llm") == {"llm": {}}
    with pytest.raises(LegolmError, match=r"summary\.json: no `clients`, another version wrote it"):
        read_json(tmp_path / "summary.json", "llm", "clients")


def test_factors_that_are_one_in_memory_are_written_each(tmp_path: Path) -> None:
    factor = torch.arange(6.0).view(2, 3)
    save_adapter_state(tmp_path, {"a": factor, "b": factor, "c": factor.T})
    found = load_adapter_state(tmp_path)
    assert all(torch.equal(found[key], wanted) for key, wanted in (("a", factor), ("b", factor), ("c", factor.T)))


def test_a_folder_in_a_files_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json" / "b").mkdir(parents=True)
    with pytest.raises(LegolmError, match=r"a\.json: cannot be written \(there is a folder\); move away what is there"):
        atomic_write(tmp_path / "a.json", "{}")
    (tmp_path / LOCK).mkdir()
    with pytest.raises(LegolmError, match=r"\.lock: cannot be written \(there is a folder\)"), locked(tmp_path):
        pass
    for path in (Path("/proc/x/y"), tmp_path / "c" / "d"):
        (tmp_path / "c").write_text("")
        with pytest.raises(LegolmError, match=f"{path}: cannot be written"):
            atomic_write(path, "")
    assert sorted(one.name for one in tmp_path.iterdir()) == [LOCK, "a.json", "c"]


def test_where_nothing_can_be_made_is_said_before_the_work() -> None:
    with pytest.raises(LegolmError, match=r"^/proc/x: /proc cannot be written to \(.*\); give another --out"):
        check_room(Path("/proc/x"))


def test_a_run_that_was_killed_at_once_goes_on(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Between the making and the naming of its first file."""
    config, out = (
        configs.validate(RunConfig, three_clients(tmp_path, ("wide", "half", "wide")), "test"),
        tmp_path / "out",
    )
    out.mkdir()
    (out / ".config.yaml.0a1b2c3d.partial").write_text("model: ")
    RunDir(out).check(config, resume=True)
    (out / "config.old").write_text("")
    with pytest.raises(LegolmError, match="is not empty and not a run"):
        RunDir(out).check(config, resume=True)
