"""The run folder: atomic writes, what is finished, and whose run it is.

A folder appears under its final name only when it is whole (written beside, synced, renamed), so whatever is there
after a kill is finished and whatever is not is done again.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from legolm import config as configs
from legolm.config import RunConfig, SiteConfig
from legolm.errors import LegolmError, nearest
from legolm.runs.placed import DEVICES, Devices, Placed, placed
from legolm.runs.records import Change, Identity, dump_sealed, read_sealed
from legolm.runs.resume import FREE, Difference, again, differences, refusal, settled
from legolm.system import LOCK, atomic_write, check_room, file_state, read_bounded

UPDATES = "updates"
"""Folder of a round's kept updates within the round's."""
DATA = "data"
"""Folder of data that were given in memory: it is there before the run."""
GIVEN = re.compile(rf".*/{DATA}/([0-9a-f]{{16}})/(\w+)/\*\.jsonl")
"""Their files, as a config has them: fingerprint and split."""
CLOCK = "clock.json"
FILES = "config.yaml run.json metrics.jsonl summary.json hashes.json rounds.csv clients.csv report.html answers.json"
"""What a run writes beside its folders."""
FINAL, WHOSE = "final", "run.txt"
"""Folder of finished models; where it is elsewhere, the file in it with the run's path."""
MAX_SHOWN = 80
C = TypeVar("C", RunConfig, SiteConfig)


@dataclass(frozen=True)
class RunDir:
    """Paths in a run folder. Another config is another run."""

    path: Path

    @staticmethod
    def open(path: Path, config: RunConfig, resume: bool, data: str | None = None) -> RunDir:
        """Start a run in a new or empty folder, or go on with one. Raises `LegolmError` when it is another's.

        What a changed field does not leave as it was is taken away. `data` is the fingerprint of the data where clients
        came.
        """
        run = RunDir(path)
        changes = run.check(config, resume)
        for stale in path.rglob(".*.partial"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        stages = {stage for change in changes for stage in again(change.field) or ()}
        moved = any(change.field == "final" for change in changes)  # the old ones stay where they are
        others = [path / stage for stage in stages - {"final"}]
        if stages:
            run.unfinish()
        for stale in [*others, *(run.models() if "final" in stages and not moved else ())]:
            shutil.rmtree(stale, ignore_errors=True)
        if changes and run.identity_file.exists():
            identity, done = run.identity(), run.rounds_done()
            made = [
                Change(field=one.field, old=one.old, new=one.new, rounds=done)
                for one in changes
                if one.field not in FREE
            ]
            update: dict[str, Any] = {
                "config": config.model_dump(mode="json"),
                "changes": [*identity.changes, *made],
                "data_fingerprint": data or identity.data_fingerprint,
            }
            atomic_write(run.identity_file, dump_sealed(identity.model_copy(update=update)))
        atomic_write(run.config_file, configs.dump(config))
        if config.final is not None:
            run.finals.mkdir(parents=True, exist_ok=True)
            atomic_write(run.finals / WHOSE, str(path.resolve()))
        return run

    def check(self, config: RunConfig, resume: bool) -> list[Difference]:
        """What a resumed run changes. Raises `LegolmError` unless the folder is new, empty, or may go on with this."""
        for name in [*FILES.split(), CLOCK, LOCK, DEVICES]:
            if (self.path / name).is_dir():
                raise LegolmError(f"{self.path / name}: is a folder, and the run keeps a file there; move it away")
        if self.exists():
            known, done = self.known(), self.rounds_done()
            found = differences(known, config)
            if any(one.field == "final" for one in found):
                self._check_finals(config)
            for one in found:
                if why := refusal(one, known, config, done):
                    raise LegolmError(
                        f"run folder {self.path}: belongs to another config, `{one.field}` differs (was "
                        f"{_shown(one.old)}, is {_shown(one.new)}); set it back, or give another --out: {why}"
                    )
            if not resume:
                raise LegolmError(
                    f"run folder {self.path}: already there; add --resume to go on, or give another --out"
                )
            return found
        check_room(self.path)
        self._check_finals(config)
        if self.path.exists() and not (self.path.is_dir() and all(map(_before_a_run, self.path.iterdir()))):
            raise LegolmError(f"run folder {self.path}: is not empty and not a run; give another --out")
        return []

    def _check_finals(self, config: RunConfig) -> None:
        """Raise `LegolmError` where final models are to come where something is: it would be taken for them."""
        place = self.path / FINAL if config.final is None else Path(config.final)
        check_room(place, field="final")
        here, there = self.path.resolve(), place.resolve()
        if here.is_relative_to(there) or (there.is_relative_to(here) and there != here / FINAL):
            raise LegolmError(f"final: {place} is the run folder, in it or around it; name one apart, or leave it out")
        if place.exists() and not (place.is_dir() and next(place.iterdir(), None) is None):
            raise LegolmError(f"final: {place} is already there and not an empty folder; name another, or move it away")

    def unfinish(self) -> None:
        """Take away the figures of a finished run that has more to do: they would be taken for those of all of it."""
        for name in ("summary.json", "hashes.json", "rounds.csv", "clients.csv", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether a run began here."""
        return self.config_file.exists() or self.identity_file.exists()

    def settled(self, config: RunConfig) -> RunConfig:
        """The config with what it leaves open as this run, if there is one, decided it."""
        return settled(self.known(), placed(self._here(config), self.devices())) if self.exists() else config

    def devices(self) -> dict[str, Placed]:
        """The devices that got a block by what they can hold. Raises `LegolmError` for what the run did not write."""
        path = self.path / DEVICES
        return read_sealed(path, Devices).devices if path.exists() else {}

    def place(self, devices: Mapping[str, Placed]) -> None:
        """Keep what these devices got: it stays theirs."""
        atomic_write(self.path / DEVICES, dump_sealed(Devices(devices={**self.devices(), **devices})))

    def rounds_done(self) -> int:
        """Finished rounds before the first that is missing, round 0 not counted."""
        number = 0
        while self.round(number + 1).exists():
            number += 1
        return number

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def identity_file(self) -> Path:
        """What the run stands on, and its config as it wrote it."""
        return self.path / "run.json"

    @property
    def clock_file(self) -> Path:
        """What the work took so far."""
        return self.path / CLOCK

    def identity(self) -> Identity:
        """Raises `LegolmError` when it is missing, damaged or of another version."""
        return read_sealed(self.identity_file, Identity)

    def site_config(self) -> SiteConfig:
        """What a simulated client reads of the config; its plug-ins are loaded."""
        found = SiteConfig.model_validate(self.identity().config)
        configs.load_plugins(found.plugins)
        return self._here(found)

    def known(self) -> RunConfig:
        """The config as the run wrote it; `config.yaml`, which people edit, only where nothing else was written yet.

        Raises `LegolmError` when another version of legolm wrote it.
        """
        if self.identity_file.exists() or (self.path / "blocks").exists():  # which come after it
            config = self.identity().config
            if isinstance(federation := config.get("federation"), dict):
                federation.setdefault("personal", "last")  # what runs of before did
            known = configs.validate(RunConfig, config, f"config in {self.identity_file}")
            return self._here(placed(known, self.devices()))
        return self._here(configs.load(self.config_file))

    def given(self, fingerprint: str) -> Path:
        """Folder of data of this fingerprint that were given in memory, with a folder a split."""
        return self.path.resolve() / DATA / fingerprint

    def given_files(self, fingerprint: str, split: str) -> str:
        """Pattern of the files in it."""
        return f"{glob.escape(str(self.given(fingerprint) / split))}/*.jsonl"

    def _here(self, config: C) -> C:
        """The config with data that were given in memory where they lie now: the folder may have been moved since."""
        moved = {}
        for split in ("train", "validation", "test"):
            lay = GIVEN.fullmatch(str(getattr(config.data, split)))
            if lay is not None and self.given(lay[1]).is_dir():
                moved[split] = self.given_files(lay[1], lay[2])
        return config.model_copy(update={"data": config.data.model_copy(update=moved)})

    def block(self, name: str) -> Path:
        """Folder of a cut block."""
        return self.path / "blocks" / name

    @property
    def sums(self) -> Path:
        """File of what clients collected of their own text for the blocks (`calibration.statistics: clients`)."""
        return self.path / "calibration.safetensors"

    def block_sums(self, block: str) -> Path:
        """File of the same of those who hold a block (`federation.regmean`)."""
        return self.path / "calibration" / f"{block}.safetensors"

    @property
    def sums_traffic(self) -> Path:
        """File of the bytes that these took, by client; round 0's record has them."""
        return self.path / "calibration.json"

    @property
    def protection(self) -> Path:
        """Folder of what fits the LLM's update to the sums (`federation.regmean`, `federation.protect`)."""
        return self.path / "protection"

    @property
    def frozen(self) -> Path:
        """File of the frozen factors that are made of text (`aggregate.whiten`)."""
        return self.path / "frozen.safetensors"

    def round(self, number: int) -> Path:
        """Folder of a finished round; 0 is the start."""
        return self.path / "rounds" / f"{number:04d}"

    def update(self, number: int, client: str) -> Path:
        """File of an accepted update of a round, where `federation.keep_updates` kept it: the client's reply."""
        return self.round(number) / UPDATES / f"{client}.safetensors"

    @property
    def secrets(self) -> Path:
        """Folder of what simulated clients keep to themselves within a round; it ends with the engine."""
        return self.path / ".secrets"

    def client_state(self, client: str) -> Path:
        """Folder of what a client itself keeps between rounds."""
        return self.path / "clients" / client

    def client_stage(self, stage: str, client: str) -> Path:
        """Folder of what one client did outside the rounds: `local` or `personal`."""
        return self.path / stage / client

    @property
    def finals(self) -> Path:
        """Folder of the finished models: the config's `final`, or one of its own."""
        file = self.identity_file if self.identity_file.exists() else self.config_file  # as in `known`
        named = _named_finals(file, file_state(file)) if file.exists() else None
        return self.path / FINAL if named is None else Path(named)

    def final(self, name: str) -> Path:
        """Folder of a finished model: the LLM's or a client's block."""
        return self.finals / name

    def models(self) -> list[Path]:
        """Folders of all finished models."""
        return sorted(one for one in self.finals.glob("[!.]*") if one.is_dir())

    def final_model(self, name: str) -> Path:
        """The same, if it is there. Raises `LegolmError` with the nearest that is."""
        known = [one.name for one in self.models()]
        if name not in known:
            hint = nearest(name, known) if known else " the run has none yet"
            raise LegolmError(f"run folder {self.path}: no final model {name!r};{hint}")
        return self.final(name)


def _before_a_run(path: Path) -> bool:
    """Whether a run may begin beside this: it, or one that was killed at once, put it there."""
    return path.name in (DATA, LOCK, CLOCK) or path.match(".*.partial")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def run_of(model: Path) -> RunDir | None:
    """The run that a finished model's folder is of; None where it is of none that is here."""
    finals = model.resolve().parent
    named = [finals.parent]
    with contextlib.suppress(OSError, ValueError):
        named.append(Path(read_bounded(finals / WHOSE, 1 << 16).decode()))
    return next((run for run in map(RunDir, named) if run.exists() and run.finals.resolve() == finals), None)


@lru_cache(maxsize=64)
def _named_finals(file: Path, _state: str) -> str | None:
    config = configs.read(file) if file.suffix == ".yaml" else read_sealed(file, Identity).config
    found = config.get("final")
    return found if isinstance(found, str) else None
