"""`live.json`: what each device of a run does now, as the run's process sees it; for who looks on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, RootModel, ValidationError

from legolm.errors import LegolmError, brief
from legolm.system import atomic_write, read_bounded

LIVE = "live.json"
State = Literal["working", "asked", "idle", "away"]
"""It has a request; it will have one; nothing is asked of it; it is not online."""


class LiveClient(BaseModel):
    """What a client does, and since when."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    state: State
    since: AwareDatetime


class Live(RootModel[dict[str, LiveClient]]):
    """By client."""

    model_config = ConfigDict(frozen=True)

    def now(self, states: Mapping[str, State]) -> Live:
        """The same with these states; one that is as it was keeps its time."""
        at = datetime.now(UTC).replace(microsecond=0)
        known = self.root
        return Live(
            {
                id: known[id] if id in known and known[id].state == state else LiveClient(state=state, since=at)
                for id, state in states.items()
            }
        )

    def write(self, folder: Path) -> None:
        """Into the run folder."""
        atomic_write(folder / LIVE, self.model_dump_json(indent=1) + "\n")


def read_live(folder: Path) -> Live:
    """Of a run folder; empty for a run without devices. Raises `LegolmError` for a file that is not one."""
    try:
        return Live.model_validate_json(read_bounded(folder / LIVE))
    except FileNotFoundError:
        return Live({})
    except (OSError, ValidationError) as error:
        raise LegolmError(f"{folder / LIVE}: cannot be read ({brief(error)}); remove it, the run writes it") from None
