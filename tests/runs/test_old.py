"""A run folder of an earlier version is refused in one line, whatever is asked of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import assert_one_line, legolm

TOO_OLD = "another version of legolm wrote it (schema 1, this one reads 2)"


def without_number(path: Path) -> None:
    """As the first version wrote it."""
    content = json.loads(path.read_text())
    content.pop("schema_number")
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def finished(
    three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(config file, folder) of a run with kept updates."""
    home = tmp_path_factory.mktemp("finished")
    federation = {"engine": "local", "rounds": 1, "keep_updates": True}
    raw = three_clients(home, ("dense", "dense", "dense"), rows=10, federation=federation)
    raw |= {"evaluate": {"local_only": False}, "train": {"steps": 1}}
    config = home / "run.yaml"
    config.write_text(json.dumps(raw))
    done = legolm("run", config, "--out", home / "out")
    assert done.returncode == 0, done.stderr
    return config, home / "out"


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it to age."""
    config, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    return config, tmp_path / "out"


@pytest.fixture
def old(run: tuple[Path, Path]) -> tuple[Path, Path]:
    """All of it as the first version wrote it: a scheme that is a mode now, no numbers."""
    config, folder = run
    written = yaml.safe_load((folder / "config.yaml").read_text())
    written["aggregate"] = {"scheme": "local_only", "form": "factor"}
    for section, key in ((written, "plugins"), (written["federation"], "mode"), (written["evaluate"], "scores")):
        section.pop(key)
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    for path in (folder / "run.json", folder / "summary.json", *folder.glob("rounds/*/metrics.json")):
        without_number(path)
    return config, folder


def test_an_old_run_is_not_resumed(old: tuple[Path, Path]) -> None:
    config, folder = old
    for sets in ((), ("--set", "precision=auto")):
        assert_one_line(legolm("run", config, "--out", folder, "--resume", *sets), f"{folder}/run.json: {TOO_OLD}")
    assert_one_line(legolm("run", folder / "config.yaml", "--out", folder, "--resume"), "'local_only' is not known")


def test_a_study_does_not_go_on_with_an_old_run(old: tuple[Path, Path], tmp_path: Path) -> None:
    config, folder = old
    study = tmp_path / "study.yaml"
    study.write_text(
        json.dumps({"run": json.loads(config.read_text()), "variants": [{"name": "new"}, {"name": "out"}]})
    )
    done = legolm("compare", study, "--out", folder.parent)
    assert_one_line(done, f"{folder}/run.json: {TOO_OLD}")
    assert not (folder.parent / "new").exists()


def test_an_old_run_is_not_reported(old: tuple[Path, Path]) -> None:
    before = (old[1] / "report.html").read_bytes()
    assert_one_line(legolm("report", old[1]), f"{old[1]}/summary.json: {TOO_OLD}")
    assert (old[1] / "report.html").read_bytes() == before


def test_nothing_is_left_out_of_an_old_run(old: tuple[Path, Path]) -> None:
    assert_one_line(legolm("ablate", old[1]), f"{old[1]}/run.json: {TOO_OLD}")
    assert not (old[1] / "ablation.json").exists()


@pytest.mark.parametrize("file", ["run.json", "rounds/0001/metrics.json"])
def test_one_old_file_is_enough(run: tuple[Path, Path], file: str) -> None:
    config, folder = run
    without_number(folder / file)
    assert_one_line(legolm("run", config, "--out", folder, "--resume"), f"{folder}/{file}: {TOO_OLD}")
    assert_one_line(legolm("ablate", folder), f"{folder}/{file}: {TOO_OLD}")


def test_a_run_without_hashes_of_its_records_would_go_on_otherwise(run: tuple[Path, Path]) -> None:
    config, folder = run
    found = json.loads((folder / "run.json").read_text())
    found.pop("hash")
    (folder / "run.json").write_text(json.dumps(found))
    says = f"{folder}/run.json: another version of legolm wrote it (without a hash of itself), whose runs go on"
    assert_one_line(legolm("run", config, "--out", folder, "--resume"), says, "start the run again in a new folder")
    assert_one_line(legolm("ablate", folder), says)


def test_an_old_summary_is_written_anew_by_a_resume(run: tuple[Path, Path]) -> None:
    config, folder = run
    without_number(folder / "summary.json")
    assert_one_line(legolm("ablate", folder), f"{folder}/summary.json: {TOO_OLD}", "write it anew: legolm run --resume")
    assert legolm("run", config, "--out", folder, "--resume").returncode == 0
    assert legolm("report", folder).returncode == 0
    assert legolm("ablate", folder).returncode == 0


def test_a_folder_where_the_run_keeps_a_file_is_refused_in_the_dry_run(run: tuple[Path, Path]) -> None:
    config, folder = run
    for name in ("clock.json", "config.yaml", "report.html"):
        (folder / name).unlink()
        (folder / name).mkdir()
        for options in (("--dry-run",), ()):
            done = legolm("run", config, "--out", folder, "--resume", *options)
            assert_one_line(done, f"{folder / name}: is a folder, and the run keeps a file there; move it away")
        (folder / name).rmdir()
        (folder / name).write_text("{}")


def test_a_file_as_the_runs_folder_is_named_as_such(finished: tuple[Path, Path]) -> None:
    config, _ = finished
    assert_one_line(legolm("run", config, "--out", config, "--dry-run"), f"{config} is a file; give another --out")
