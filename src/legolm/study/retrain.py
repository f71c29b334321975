"""A run again without some of its clients, who are scored but train in no round: what others learn without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from legolm.config import CLIENTS, BlockConfig, ReportConfig, RunConfig, validate
from legolm.errors import LegolmError
from legolm.pipeline import run as run_whole
from legolm.plan import make_plan, read_parts
from legolm.runs import RunDir
from legolm.system import Progress, check_room, held_bytes

WITHOUT = "without"
"""Folder of such runs, each by the kind and name of what it leaves out."""


def check_without(run: RunDir, config: RunConfig, left_out: Mapping[str, Sequence[str]], out: Path) -> None:
    """Raise `LegolmError` for a run without some clients (ids by name) that cannot be, or cannot go on with what is in
    `out`, and without room for all.
    """
    parts, needed = read_parts(config), 0
    for name, clients in left_out.items():
        try:
            without = config_without(run, config, clients)
            plan = make_plan(without, parts)
            RunDir(out / WITHOUT / name).check(without, resume=True)
            needed += plan.disk_bytes - plan.models_bytes
        except LegolmError as error:
            raise LegolmError(f"without {name}: {error}; or name what to leave out (--only)") from None
    check_room(out, needed - held_bytes(out / WITHOUT))


def run_without(run: RunDir, config: RunConfig, clients: Collection[str], folder: Path, progress: Progress) -> RunDir:
    """Run or finish it in `folder`; blocks that are cut by clients' sums are cut anew, by those of the others."""
    run_whole(config_without(run, config, clients), folder, folder.exists(), progress, models=False)
    return RunDir(folder)


def config_without(run: RunDir, config: RunConfig, clients: Collection[str]) -> RunConfig:
    """The run's config with these clients joining after the last round, and nothing that is only for clients' ends.

    Blocks that do not depend on who takes part are the run's. Raises `LegolmError` for what cannot be.
    """
    changed = config.model_copy(
        update={
            "blocks": [
                BlockConfig(name=one.name, path=str(run.block(one.name).absolute()))
                if one.method != "dense" and one.calibration.statistics != CLIENTS
                else one
                for one in config.blocks
            ],
            "clients": [
                one.model_copy(update={"joins": config.federation.rounds + 1, "leaves": None})
                if one.id in clients
                else one
                for one in config.clients
            ],
            "federation": config.federation.model_copy(
                update={
                    "keep_updates": False,
                    "personal": "last",
                    "personal_steps": 0,
                    "min_replies": _least(config, clients),
                }
            ),
            "evaluate": config.evaluate.model_copy(update={"local_only": False}),
            "report": ReportConfig(),
            "final": None,
        }
    )
    return validate(RunConfig, changed.model_dump(mode="json"), "config.yaml")


def _least(config: RunConfig, without: Collection[str]) -> int:
    """Of the replies that were asked of all as many as are left in each round; who is capable is not known here."""
    federation, left = config.federation, [one for one in config.clients if one.id not in without]
    if federation.capable:
        return 1
    there = (sum(one.there(number) for one in left) for number in range(1, federation.rounds + 1))
    return max(1, min(federation.min_replies, *there))
