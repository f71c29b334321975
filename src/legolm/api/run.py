"""A run's folder as an object: read when asked, and what it holds typed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from legolm.api.door import door
from legolm.block import Block, read_block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.report import draw
from legolm.runs import Data, RoundRecord, RunDir, StageRecord, Summary, read_stages, rounds_of
from legolm.system import atomic_write


@dataclass(frozen=True)
class Plot:
    """A figure as SVG: a notebook shows it, `save` writes it."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    @door
    def save(self, path: str | Path) -> None:
        """Write the figure, all or nothing."""
        atomic_write(Path(path), self.svg + "\n")


class Run:
    """A run in its folder, finished or under way. Raises `LegolmError` where there is none."""

    @door
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not RunDir(self.folder).config_file.is_file():
            raise LegolmError(f"run folder {self.folder}: no config.yaml; give the folder of a run")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return RunDir(self.folder).known()

    @property
    def records(self) -> list[StageRecord]:
        """Of every finished stage, in order."""
        return read_stages(self.folder / "metrics.jsonl")

    @property
    def rounds(self) -> list[RoundRecord]:
        """Of the finished rounds; round 0 is before training. `round.llm.loss` is the LLM's, nats per answer token."""
        return rounds_of(self.records)

    @property
    def summary(self) -> Summary:
        """The figures of a finished run; `to_frame()` gives them to pandas. Raises `LegolmError` before its end."""
        return Summary.read(self.folder)

    @door
    def block(self, name: str) -> Block:
        """What a client ended with, or the LLM (`llm`): a finished model with its coverage."""
        return read_block(self._final(name))

    @door
    def model(self, name: str) -> tuple[Any, Any]:
        """(model, tokenizer) of what a client ended with, or of the LLM (`llm`), as transformers loads them."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self._final(name)
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    @door
    def plot(self, what: Literal["loss", "clients"] = "loss", data: Data = "own") -> Plot:
        """Figure 3 (`loss` by round) or a row a client (`clients`), on clients' own or the others' data."""
        return Plot(draw(self.summary, what, data))

    def _final(self, name: str) -> Path:
        return RunDir(self.folder).final_model(name)
