"""The finished stages of a run: each a folder that appears only when it is whole, and all their records.

What is finished is read once; after that the memory knows it, and the disk only gets what is new.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.runs.folder import RunDir
from legolm.runs.records import (
    AnyStage,
    Criterion,
    Global,
    RoundRecord,
    StageRecord,
    added,
    best_round,
    dump_record,
    dump_sealed,
    read_sealed,
    rounds_of,
)
from legolm.system import atomic_folder, atomic_write, file_hash, open_tensors, writing

ADAPTER, METRICS = "adapter.safetensors", "metrics.json"
Tensors = dict[str, Tensor]


class Stages:
    """The stages of a run in order, and what is finished of them."""

    def __init__(self, folder: RunDir, config: RunConfig) -> None:
        self._folder = folder
        clients = [client.id for client in config.clients]
        self._alone = {
            stage: [folder.client_stage(stage, id) for id in clients if wanted]
            for stage, wanted in (("local", config.evaluate.local_only), ("personal", bool(config.own_parts)))
        }
        self.limit(0 if config.federation.mode == "alone" else config.federation.rounds)
        self._records = {path: read_stage(path) for path in self._paths if path.exists()}

    def limit(self, rounds: int) -> None:
        """End after so many rounds."""
        self.rounds = rounds
        numbers = range(rounds + 1)
        before, *after = [self._folder.round(number) for number in numbers]
        self._paths = [before, *self._alone["local"], *after, *self._alone["personal"]]

    @property
    def finished(self) -> bool:
        """Nothing is left to do."""
        return not self.missing

    @property
    def missing(self) -> list[Path]:
        """The folders of the stages that are not finished, in order."""
        return [path for path in self._paths if path not in self._records]

    def has(self, path: Path) -> bool:
        """Whether a stage is finished."""
        return path in self._records

    def records(self) -> list[StageRecord]:
        """Of every finished stage, in order."""
        return [self._records[path] for path in self._paths if path in self._records]

    def before(self, number: int) -> list[RoundRecord]:
        """The records of the finished rounds before this one, from the first on."""
        return [one for one in rounds_of(self.records()) if 0 < one.round < number]

    def round(self, number: int) -> RoundRecord:
        """The record of a finished round."""
        record = self._records[self._folder.round(number)]
        assert isinstance(record, RoundRecord)
        return record

    def best(self, by: Criterion) -> int:
        """The finished round that is the best by this."""
        return best_round(self.records(), by).round

    def state(self, path: Path) -> Tensors:
        """What a finished stage kept. Raises `LegolmError` when it is not what the run wrote."""
        return checked_state(path, self._records[path])

    def fill(self, partial: Path, path: Path, adapter: Tensors, record: StageRecord) -> None:
        """Fill the folder `partial` of the stage `path`; `keep` or its caller makes it appear."""
        save_adapter_state(partial, adapter)
        record = record.model_copy(update={"adapter": file_hash(partial / ADAPTER)})
        (partial / METRICS).write_text(dump_sealed(record), encoding="utf-8")
        self._records[path] = record

    def keep(self, path: Path, adapter: Tensors, record: StageRecord) -> None:
        """Make a stage's folder, and add a line to `metrics.jsonl`."""
        with atomic_folder(path) as partial:
            self.fill(partial, path, adapter, record)
        record = self._records[path]
        lines = self._folder.path / "metrics.jsonl"
        with writing(lines), lines.open("a", encoding="utf-8") as file:
            file.write(dump_record(record, indent=None))

    def score_again(self, path: Path, scored: Global, seconds: float | None = None) -> None:
        """Put other scores into the record of a finished round, and what it took in all, if given.

        Their bytes come to those of the scores of before.
        """
        took, before = {} if seconds is None else {"seconds": seconds}, self._records[path]
        assert isinstance(before, RoundRecord)
        scoring = added([before.scoring, scored.scoring])
        record = before.model_copy(update=dict(scored) | {"scoring": scoring} | took)
        atomic_write(path / METRICS, dump_sealed(record))
        self._records[path] = record

    def write_lines(self) -> None:
        """`metrics.jsonl` anew, in the stages' order: after a kill no line is missing, broken or there twice."""
        lines = "".join(dump_record(record, indent=None) for record in self.records())
        atomic_write(self._folder.path / "metrics.jsonl", lines)


def save_adapter_state(path: Path, adapter: Tensors) -> None:
    """Write an adapter's tensors, in any order of memory and some perhaps one in memory, into the folder `path`."""
    path.mkdir(exist_ok=True)
    save_file(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in adapter.items()}, path / ADAPTER
    )


def read_stage(path: Path) -> StageRecord:
    """The record of the stage at `path`. Raises `LegolmError` when it is not what was written."""
    return read_sealed(path / METRICS, AnyStage).root


def check_state(path: Path, record: StageRecord) -> None:
    """Raise `LegolmError` when what the stage at `path` kept is not what was written."""
    if not (path / ADAPTER).is_file() or file_hash(path / ADAPTER) != record.adapter:
        raise LegolmError(
            f"{path / ADAPTER}: is not what the run wrote (its hash differs from the one in {METRICS}); restore it, or "
            f"remove {path} and run again with --resume"
        )


def checked_state(path: Path, record: StageRecord) -> Tensors:
    """The tensors of the stage at `path` with this record. Raises `LegolmError` when they are not what was written."""
    check_state(path, record)
    return load_adapter_state(path)


def load_adapter_state(path: Path) -> Tensors:
    """The tensors that a stage kept. Raises `LegolmError` when they are missing or broken."""
    with open_tensors(path / ADAPTER, "", "start the run again in a new folder") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
