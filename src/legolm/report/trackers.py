"""A run's rounds for TensorBoard and MLflow, where the config asks for them: what stands in the run's records."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol

from legolm.config import RunConfig
from legolm.errors import brief
from legolm.report.plots import MOST_DRAWN
from legolm.runs import RoundRecord, RunDir, StageRecord, rounds_of
from legolm.system import atomic_write, read_bounded

EVENTS = "tensorboard"
"""Folder of TensorBoard's files in the run folder."""
MLFLOW = "mlflow.txt"
"""File with the id of the run at MLflow, so that a resumed run goes on with it."""


class Tracker(Protocol):
    """Where figures go. It may fail in any way: a library, a disk, a server."""

    left: int
    """The first round that it does not have."""

    def write(self, round: int, figures: dict[str, float]) -> None:
        """Keep a round's figures."""

    def flush(self, finished: bool) -> None:
        """Show what was kept; `finished`: nothing more comes."""


class TensorBoard:
    """Event files. Those of before stay, and TensorBoard passes over them."""

    def __init__(self, folder: RunDir, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.left = 0
        self._writer = SummaryWriter(str(folder.path / EVENTS), purge_step=0)

    def write(self, round: int, figures: dict[str, float]) -> None:
        """Keep a round's figures."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)

    def flush(self, finished: bool) -> None:
        """Show what was kept."""
        self._writer.close() if finished else self._writer.flush()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (`legolm`) at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: RunDir, config: RunConfig) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a round waits for it; the next one tries again
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric, known = MlflowClient(), Metric, folder.path / MLFLOW
        if known.exists():
            self._run = read_bounded(known).decode()
            history = self._client.get_metric_history(self._run, "seconds")  # which every round has
            self.left = 1 + max((one.step for one in history), default=-1)
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "legolm")
        experiment = self._client.get_experiment_by_name(name)
        id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(id, run_name=folder.path.resolve().name).info.run_id
        self.left = 0
        for field, value in (
            ("model", config.model),
            ("seed", config.seed),
            ("scheme", config.aggregate.scheme),
            ("clients", len(config.clients)),
            ("engine", config.federation.engine),
        ):
            self._client.log_param(self._run, field, value)
        atomic_write(known, self._run)

    def write(self, round: int, figures: dict[str, float]) -> None:
        """Keep a round's figures."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now, round) for name, value in figures.items()])

    def flush(self, finished: bool) -> None:
        """Show what was kept."""
        if finished:
            self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[RunDir, RunConfig], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""By the field of the config's section `report`."""


class Trackers:
    """Those that the config asks for. What they cannot take ends no run: it is said, and tried again with the next."""

    def __init__(self, folder: RunDir, config: RunConfig, note: Callable[[str], None]) -> None:
        self._folder, self._config, self._note = folder, config, note
        self._asked = [name for name, asked in config.report if asked]
        self._open: dict[str, Tracker] = {}

    def __call__(self, records: Callable[[], Sequence[StageRecord]], finished: bool = False) -> None:
        """Write the rounds among the run's records that are not written yet."""
        rounds = rounds_of(records()) if self._asked else []
        for name in self._asked:
            try:
                if name not in self._open:
                    self._open[name] = TRACKERS[name](self._folder, self._config)
                tracker = self._open[name]
                for record in rounds:
                    if record.round >= tracker.left:
                        tracker.write(record.round, figures(record))
                        tracker.left = record.round + 1
                tracker.flush(finished)
            except Exception as error:  # whatever a library, a disk or a server comes up with
                again = "a resumed run tries again" if finished else "the next round tries again"
                self._note(f"report.{name}: round {rounds[-1].round} is not written ({brief(error)}); {again}")


def figures(record: RoundRecord) -> dict[str, float]:
    """Of a round, by name. Losses are nats per answer token, `test` the mean over clients' own data, `validation` that
    over the clients that have scores: of `unscored` ones there are none.

    Missing are the clients that the round asked and has no update of. Bytes are all clients', of scoring too.
    """
    own = {id: scores.root[id] for id, scores in record.by_client().items()}
    trained, missing = record.train.values(), len(record.refused) + len(record.waiting)
    found = {
        "loss/train": fmean(one.loss_last for one in trained) if trained else None,
        "loss/validation": record.validation,
        "loss/test": fmean(one.loss for one in own.values()) if own else None,
        "loss/llm": record.llm.loss if record.llm else None,
        "exact_match/test": fmean(one.exact_match for one in own.values()) if own else None,
        "exact_match/llm": record.llm.exact_match if record.llm else None,
        "bytes/up": sum(one.up for one in record.sent.values()),
        "bytes/down": sum(one.down for one in record.sent.values()),
        "privacy/epsilon": record.privacy.epsilon if record.privacy else None,
        "clients/updates": len(record.accepted),
        "clients/missing": missing,
        "clients/unscored": len(record.unscored) or None,
        "seconds": record.seconds,
    }
    if len(own) <= MOST_DRAWN:
        found |= {f"loss/client/{id}": one.loss for id, one in own.items()}
    return {name: float(value) for name, value in found.items() if value is not None}
