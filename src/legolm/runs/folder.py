"""The run folder: atomic writes, what is finished, and whose run it is.

A folder appears under its final name only when it is whole (written beside, synced, renamed), so whatever is there
after a kill is finished and whatever is not is done again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from legolm import config as configs
from legolm.config import RunConfig, SiteConfig
from legolm.errors import LegolmError
from legolm.runs.records import Identity, read_record
from legolm.system import LOCK, atomic_write

FREE = ("engine", "threads", "deadline_s", "min_replies")
"""Fields of `federation` that a resumed run may change: they do not change what was done."""
UPDATES = "updates"
"""Folder of a round's kept updates within the round's."""
DATA = "data"
"""Folder of data that were given in memory: it is there before the run."""


@dataclass(frozen=True)
class RunDir:
    """Paths in a run folder. `config.yaml` is its identity: another config is another run."""

    path: Path

    @staticmethod
    def open(path: Path, config: RunConfig, resume: bool) -> RunDir:
        """Start a run in a new or empty folder, or go on with one. Raises `LegolmError` when it is another's."""
        run = RunDir(path)
        run.check(config, resume)
        if run.config_file.exists():
            for stale in path.rglob(".*.partial"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if not run.config_file.exists() or run.config_file.read_text(encoding="utf-8") != configs.dump(config):
            atomic_write(run.config_file, configs.dump(config))
        return run

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raise `LegolmError` unless the folder is new, empty, or this config's and may be resumed."""
        if self.config_file.exists():
            self._check_version()
            known = self.config()
            same = {name: getattr(known.federation, name) for name in FREE}
            asked = config.model_copy(update={"federation": config.federation.model_copy(update=same)})
            if asked != known:
                field = next(name for name in type(known).model_fields if getattr(asked, name) != getattr(known, name))
                raise LegolmError(
                    f"run folder {self.path}: belongs to another config, `{field}` differs (see its config.yaml); give "
                    f"another --out. A resumed run may change only federation.{', '.join(FREE)}"
                )
            if not resume:
                raise LegolmError(
                    f"run folder {self.path}: already there; add --resume to go on, or give another --out"
                )
        elif self.path.exists() and not (
            self.path.is_dir() and {one.name for one in self.path.iterdir()} <= {DATA, LOCK}
        ):
            raise LegolmError(f"run folder {self.path}: is not empty and not a run; give another --out")

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    def config(self) -> RunConfig:
        """The resolved config, validated again. Raises `LegolmError` when another version of legolm wrote it."""
        self._check_version()
        return configs.load(self.config_file)

    def site_config(self) -> SiteConfig:
        """What a simulated client reads of the config; its plug-ins are loaded."""
        found = SiteConfig.model_validate(configs.read(self.config_file))
        configs.load_plugins(found.plugins)
        return found

    def _check_version(self) -> None:
        """Of what is there: a folder of before is too old, whatever else would be said of its config."""
        if (self.path / "run.json").exists():
            read_record(self.path / "run.json", Identity)

    def block(self, name: str) -> Path:
        """Folder of a cut block."""
        return self.path / "blocks" / name

    def round(self, number: int) -> Path:
        """Folder of a finished round; 0 is the start."""
        return self.path / "rounds" / f"{number:04d}"

    def update(self, number: int, client: str) -> Path:
        """File of an accepted update of a round, where `federation.keep_updates` kept it: the client's reply."""
        return self.round(number) / UPDATES / f"{client}.safetensors"

    def client_state(self, client: str) -> Path:
        """Folder of what a client itself keeps between rounds."""
        return self.path / "clients" / client

    def client_stage(self, stage: str, client: str) -> Path:
        """Folder of what one client did outside the rounds: `local` or `personal`."""
        return self.path / stage / client

    def final(self, name: str) -> Path:
        """Folder of a finished model: the LLM's or a client's block."""
        return self.path / "final" / name
