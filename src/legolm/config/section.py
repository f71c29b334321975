"""What every section of a config is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of known keys that does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _at_home(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{path!r} is in the home of nobody; write the whole path") from None


LocalPath = Annotated[str, AfterValidator(_at_home)]
"""A file or folder of this machine; `~` is the home folder."""
