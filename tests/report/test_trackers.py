"""TensorBoard and MLflow get each finished round once, whatever became of the process that wrote the last one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import legolm
from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.report import Trackers
from legolm.runs import RunDir, read_stages, rounds_of

Make = Callable[..., dict[str, Any]]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: by name, (round, figure)."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_the_rounds_of_a_run_and_of_a_resumed_one(three_clients: Make, tmp_path: Path) -> None:
    raw = three_clients(tmp_path, ("dense",) * 3, report={"tensorboard": True}, evaluate={"local_only": False})
    raw["federation"]["rounds"], out = 1, tmp_path / "out"
    for rounds in (1, 2):
        raw["federation"]["rounds"] = rounds
        pipeline.run(configs.validate(RunConfig, raw, "test"), out, resume=rounds == 2, models=False)
        records, found = rounds_of(read_stages(out / "metrics.jsonl")), shown(out)
        for name, wanted in (
            ("loss/validation", [one.validation for one in records]),
            ("loss/client/fr", [one.by_client()["fr"].root["fr"].loss for one in records]),
            ("bytes/up", [sum(way.up for way in one.bytes.values()) for one in records]),
            ("clients/updates", [0, 3, 3][: rounds + 1]),
            ("clients/missing", [0, 0, 0][: rounds + 1]),
        ):
            assert found[name] == [(number, pytest.approx(value)) for number, value in enumerate(wanted)], name
    assert "privacy/epsilon" not in found and [step for step, _ in found["loss/train"]] == [1, 2]

    # What cannot be written ends nothing, and comes later.
    other, said = RunDir(tmp_path / "other"), list[str]()
    other.path.mkdir()
    (other.path / "tensorboard").write_text("in the way")
    track = Trackers(other, configs.validate(RunConfig, raw, "test"), said.append)
    track(lambda: records[:2])
    (line,) = said
    assert line.startswith("report.tensorboard: round 1 is not written (") and "the next round tries again" in line
    (other.path / "tensorboard").unlink()
    track(lambda: records, finished=True)
    assert len(said) == 1 and shown(other.path) == found


def test_mlflow_goes_on_with_its_run(three_clients: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where somebody has installed MLflow: it is too large for everyone's set-up."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    raw = three_clients(tmp_path, ("dense",) * 3, report={"mlflow": True}, evaluate={"local_only": False})
    config, out, said = configs.validate(RunConfig, raw, "test"), tmp_path / "out", list[str]()
    pipeline.run(config, out, models=False)
    records, client = rounds_of(read_stages(out / "metrics.jsonl")), mlflow.MlflowClient()
    Trackers(RunDir(out), config, said.append)(lambda: records, finished=True)  # of another process
    (run,) = client.search_runs([client.get_experiment_by_name("legolm").experiment_id])
    history = sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss/validation"))
    assert history == [(one.round, pytest.approx(one.validation)) for one in records] and not said
    assert (run.info.status, run.info.run_name, run.data.params["scheme"]) == ("FINISHED", "out", "heteagg")


def test_a_tracker_that_is_not_installed(three_clients: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = three_clients(tmp_path, ("dense",) * 3, report={"mlflow": True})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = legolm("run", tmp_path / "run.yaml", "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "report.mlflow: needs mlflow; run: pip install 'legolm[mlflow]', or set it to false" in done.stderr
