"""What every section of a config is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of known keys that does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
