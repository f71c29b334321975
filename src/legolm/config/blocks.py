"""The sections of a block: what it is cut by, what pruning sees, and its recovery."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from legolm.config.registry import CRITERIA, Registry
from legolm.config.section import Layer, LocalPath, Name, OpenSection, Quantity, RowsConfig, Section

CLIENTS = "clients"
"""In the place of files of sums: a run asks its clients for theirs."""


class TextConfig(RowsConfig):
    """Windows of a text: a starter set, `pydoc` (Python's help topics), a text file, or a file of rows (JSON, JSONL,
    CSV, Parquet), which is read as `data` is and rendered as in training.
    """

    text: str = "starter"
    samples: int = Field(32, ge=1)
    length: int = Field(256, ge=8, description="tokens a sample")


class ProtectConfig(TextConfig):
    """Public text on which the LLM is to stay what it was: what it writes by itself, or one that is given."""

    text: str = Field("generated", description="`generated`: the LLM writes it; else as of `calibration`")
    weight: float = Field(0.5, gt=0, description="λ, for as many tokens of it as the clients summed")

    @property
    def generated(self) -> bool:
        """Whether the LLM writes it, and it is nowhere to be read."""
        return self.text == "generated"


class CalibrationConfig(TextConfig):
    """What pruning and recovery see: text, or instead of it sums that clients collected (`legolm calibrate`), or that a
    run asks them for (`statistics: clients`): each over `samples` of its own training rows, or as many as it has.
    """

    statistics: Literal["clients"] | tuple[LocalPath, ...] | None = Field(
        None, description="files of `legolm calibrate`, which are added up; or `clients`: a run asks them"
    )
    sketch: int | None = Field(
        128,
        ge=1,
        description="columns of the sketches in which clients that a run asks send second moments; null: whole",
    )

    @field_validator("statistics", mode="before")
    @classmethod
    def _clients_or_files(cls, value: object) -> object:
        if value not in (None, CLIENTS) and not (isinstance(value, list | tuple) and value):
            raise ValueError(f"give `{CLIENTS}`, or a list of files of `legolm calibrate`")
        return value

    @field_validator("statistics")
    @classmethod
    def _each_once(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            places = [Path(file).resolve() for file in value]
            for file, place in zip(value, places, strict=True):
                if places.count(place) > 1:
                    raise ValueError(f"{file} is named twice, so that its client would count twice; name it once")
        return value

    @model_validator(mode="after")
    def _asked_for_sketches(self) -> CalibrationConfig:
        if self.statistics != CLIENTS and self.sketch != type(self).model_fields["sketch"].default:
            raise ValueError(f"sketch {self.sketch}: is for `statistics: {CLIENTS}`; give that too, or leave it out")
        return self


class RecoverConfig(Section):
    """Distillation from the LLM after the cut, at the first of `steps` and `minutes` done. 0 steps: none.

    A block of a run that says neither is recovered when the run has time for it (`RunConfig.cuts`).
    """

    steps: int | None = Field(None, ge=0)
    minutes: float | None = Field(
        None,
        gt=0,
        description="of steps, at most, and one step at least; the result then depends on the machine's speed",
    )
    text: str | None = Field(None, description="like calibration.text, which it is if not given")
    batch_size: int = Field(8, ge=1, description="windows of calibration.length tokens a step")
    rank: int | None = Field(16, ge=1, description="of a LoRA that is merged; null trains the weights themselves")
    learning_rate: float = Field(2e-3, gt=0)

    @property
    def most_steps(self) -> int:
        """What `steps` and `minutes` allow; a step takes a second at least."""
        if self.steps is not None or self.minutes is None:
            return self.steps or 0
        return math.ceil(60 * self.minutes)


class BlockConfig(OpenSection):
    """One block: to cut, by a method to a target, or one that is there already (`path`, a block's folder).

    `structured` takes a budget or a shape in the model config's words; `window` takes a shape, with layers by name, and
    keeps units by their place; a criterion takes a sparsity or a pattern, and its own settings stand here too.
    """

    named: ClassVar[str] = "method"
    registry: ClassVar[Registry[Any]] = CRITERIA
    others: ClassVar[tuple[str, ...]] = ("given", "dense", "structured", "window")

    name: Name
    method: str = Field(
        "given", description="dense, structured, window, a criterion (magnitude, wanda, sparsegpt); with path none"
    )
    path: LocalPath | None = Field(None, description="folder of a block of this LLM, taken as it is")
    sparsity: float | None = Field(None, ge=0, lt=1, description="removed share of the decoder's linear weights")
    pattern: str | None = Field(None, pattern=r"^[1-9]\d?:[1-9]\d?$", description="N:M, N kept of each M in a row")
    params: Quantity | None = Field(None, description="stored parameters at most, for instance 70M")
    memory: Quantity | None = Field(None, description="bytes of weights at most, for instance 150MB")
    speedup: float | None = Field(None, gt=1, description="tokens generated a second, over the LLM's, measured here")
    intermediate_size: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    num_hidden_layers: int | None = Field(None, ge=1)
    layers: tuple[Layer, ...] | None = Field(
        None, min_length=1, description="window: LLM layers kept; all if not given"
    )
    offset: int | None = Field(None, ge=0, description="window: the first unit kept, counted around; 0 if not given")
    adapter: Literal["plain"] | None = Field(
        None,
        description="plain: LoRA stands beside the zeros of a criterion's block, not under its mask: fewer operations, "
        "and what is learned fits the LLM better; merged, the zeros are gone",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    recover: RecoverConfig = RecoverConfig()

    @property
    def may_recover(self) -> bool:
        """Nothing was said of recovery, there is something to recover, and text for it that is not only sums."""
        undecided = self.recover.steps is None and self.recover.minutes is None
        return (
            undecided
            and self.method not in ("dense", "given")
            and not (self.calibration.statistics and not self.recover.text)
        )

    @model_validator(mode="after")
    def _one_target(self) -> BlockConfig:
        shape = (self.intermediate_size, self.num_key_value_heads, self.num_hidden_layers, self.layers)
        budgets = {name: getattr(self, name) for name in ("sparsity", "params", "memory", "speedup")}
        given = [name for name, value in budgets.items() if value is not None]
        given += ["a shape"] if any(size is not None for size in shape) else []
        given += ["pattern"] if self.pattern else []
        if (self.method == "given") != (self.path is not None):
            raise ValueError("give a `method` to cut it by, or the `path` of a block, not both")
        allowed = {
            "given": [],
            "dense": [],
            "structured": [*budgets, "a shape"],
            "window": ["a shape"],
        }.get(self.method, ["sparsity", "pattern"])
        if len(given) != min(len(allowed), 1) or not set(given) <= set(allowed):
            takes = f"one of {', '.join(allowed)}" if allowed else "no target: it is the whole LLM, or a block as it is"
            raise ValueError(f"{self.method} takes {takes}; here is {' and '.join(given) or 'none'}")
        self._check_window()
        if self.adapter and self.method in self.others:
            why = "a block is taken as it was cut" if self.path else f"{self.method} has no bit masks"
            raise ValueError(f"`adapter: {self.adapter}` is for a criterion's cut, and {why}")
        if self.pattern and int(self.pattern.split(":")[0]) >= int(self.pattern.split(":")[1]):
            raise ValueError(f"pattern {self.pattern}: N must be less than M")
        by_width = given == ["a shape"] and self.num_hidden_layers is None
        if self.calibration.statistics and self.method == "structured" and not by_width:
            raise ValueError(
                "structured with calibration.statistics takes intermediate_size and num_key_value_heads: "
                "to choose a shape or layers, text is needed"
            )
        fits = not (self.recover.most_steps and self.recover.text is None)
        if self.calibration.statistics and fits and self.calibration.text != CalibrationConfig().text:
            raise ValueError(
                f"calibration.text {self.calibration.text}: beside calibration.statistics only recovery without a text "
                "of its own reads it; leave it out, or give recover.steps"
            )
        return self

    def _check_window(self) -> None:
        windows, others = ("layers", "offset"), ("num_hidden_layers",)
        for name in others if self.method == "window" else windows:
            if getattr(self, name) is not None:
                takes = (
                    "layers by name, in `layers` of a config"
                    if self.method == "window"
                    else "what to keep by what it costs"
                )
                raise ValueError(f"`{name}` is not for {self.method}, which takes {takes}")
        if self.layers and any(one >= two for one, two in pairwise(self.layers)):
            raise ValueError(f"layers {list(self.layers)}: name each once, in ascending order")
