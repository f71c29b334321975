"""Memory that a process can have, where a container or a batch system gives it less than the machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from legolm.system import available_bytes, memory, total_bytes


def group(folder: Path, version: int, limit: str, used: int, files: tuple[int, int] | None) -> None:
    """A control group's files, with what stands in them beside."""
    names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    if files is not None:  # read long ago, and lately
        stat = "anon 7\ninactive_file 3\n" if version == 1 else "anon 7\n"  # version 1: of the group alone
        stat += f"{names[2]}inactive_file {files[0]}\n{names[2]}active_file {files[1]}\nshmem 9\n"
        (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_of_a_process_and_of_all_that_it_is_in(tmp_path: Path, version: int) -> None:
    mounted, groups = tmp_path / "cgroup", tmp_path / "own"
    root = mounted / "memory" if version == 1 else mounted
    groups.write_text("3:cpu:/other\n" + ("2:memory:/job/step\n0::/\n" if version == 1 else "0::/job/step\n"))
    assert memory._limits(groups, mounted) == []
    group(root / "job" / "step", version, str(2**63 - 4096) if version == 1 else "max", 300, (100, 0))
    group(root / "job", version, "4000", 1000, (300, 100))
    group(mounted / "other", version, "1", 1, (0, 0))
    found = memory._limits(groups, mounted)
    assert (4000, 600) in found and len(found) == (2 if version == 1 else 1)
    # A container sees its own group as the first, under a path that is the machine's.
    groups.write_text("2:memory:/docker/abc\n" if version == 1 else "0::/docker/abc\n")
    group(root, version, "5000", 700, None)
    assert memory._limits(groups, mounted) == [(5000, 700)]
    assert memory._limits(tmp_path / "none", mounted) == []  # no Linux


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_limits", lambda: [(2**63 - 4096, 5), (3000, 1000), (2500, 100)])
    assert (available_bytes(), total_bytes()) == (2000, 2500)
    monkeypatch.setattr(memory, "_limits", lambda: [(3000, 4000)])
    assert available_bytes() == 0
    monkeypatch.setattr(memory, "_limits", list)
    assert total_bytes() == machine and 0 < available_bytes() <= machine
