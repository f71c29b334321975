"""Sections of a run's configuration: data, clients, adapter, training and evaluation, each field with its default."""

from __future__ import annotations

from datetime import date as Day
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from legolm.config.registry import TRAINERS, Registry
from legolm.config.section import Layer, LocalPath, Name, OpenSection, RowsConfig, Section, Share
from legolm.errors import nearest

AUTO = "auto"
"""In the place of a block's name: the largest that the client's device says it can hold."""
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


class Split(Section):
    """How rows become parts, one a client: by file, by folder, by a column's value, IID, or Dirichlet over a column.

    `file` is a file's stem, or the name of its folder where clients are called so. A validation or test set by file
    that has no client's name is everyone's.
    """

    by: Literal["file", "folder", "column", "iid", "dirichlet"] = "file"
    column: str | None = None
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is heterogeneous")

    @model_validator(mode="after")
    def _column_given(self) -> Split:
        if self.by in ("column", "dirichlet") and not self.column:
            raise ValueError(f"split by {self.by} needs `column`: the field whose values tell rows apart")
        return self


class DataConfig(RowsConfig):
    """Examples: a built-in set (`starter`, `starter-dates`, `starter-languages`), files (JSON, JSONL, CSV, Parquet;
    globs allowed) or a hub data set (`hub:owner/name`, `:split` or `:config:split` behind it).

    `validation` and `test` are paths like `train`, or a share of each client's training rows to hold out.
    """

    train: str | list[str] = "starter"
    fetch: str | None = Field(None, description="command that brings files which are not there; errors say it")
    validation: str | list[str] | Share = 0.1
    test: str | list[str] | Share = 0.2
    split: Split = Split()
    system: str | None = Field(None, description="system message put before each conversation without one")
    template: LocalPath = Field(
        "model", description="chat template: the model's own, `alpaca`, `chatml`, or a file in Jinja"
    )
    date: Day = Field(Day(2024, 7, 26), description="the day that a template which writes today's writes")
    limit_train: int | None = Field(None, ge=1, description="keep at most this many training examples a client")
    limit_validation: int | None = Field(None, ge=1)
    limit_test: int | None = Field(None, ge=1)


class Profile(Section):
    """What a device can hold. Its client trains with the fastest settings that fit: micro-batches of
    `train.micro_batch_tokens`, smaller ones, then checkpointing; without a block it gets the largest that fits so.
    """

    memory_mb: float = Field(gt=0, description="memory of the process that fine-tunes, in MB (1e6 bytes)")


class ClientConfig(Section):
    """One client: its part of the data, and its block by name, by round or by what its device holds (`profile`).

    With engine deployment `block: auto` asks the device itself when it comes.
    """

    id: Name
    data: str | None = Field(None, description="name of its part of the data; its id if not given")
    block: str | None = None
    blocks: list[str] | None = Field(
        None, min_length=2, description="its block in each round in turn; it is scored and ends with the first"
    )
    profile: Profile | None = None
    rank: int | None = Field(None, ge=1, description="its LoRA rank; lora.rank if not given")
    layers: list[Layer] | None = Field(
        None, min_length=1, description="LLM layers whose adapter it trains; all that its block has if not given"
    )
    joins: int = Field(1, ge=1, description="first round that it takes part in")
    leaves: int | None = Field(None, ge=1, description="last round that it takes part in")
    relay: bool = Field(False, description="it is a relay: it answers for a region of devices that hold its block")

    @model_validator(mode="after")
    def _one_way(self) -> ClientConfig:
        named = [one for one in (self.block, self.blocks) if one is not None]
        if len(named) > 1 or not (named or self.profile):
            raise ValueError("give one of `block`, `blocks` and `profile`, or a `profile` beside one of the others")
        if self.block == AUTO and self.profile is not None:
            raise ValueError("`block: auto` asks the device what it holds; take `profile` out, or `block`")
        if self.layers is not None and self.block in (None, AUTO):
            raise ValueError("`layers` is for a client with `block`: by round or profile its layers may be others")
        if self.leaves is not None and self.leaves < self.joins:
            raise ValueError(f"leaves after round {self.leaves}, before it joins in round {self.joins}")
        return self

    @property
    def named(self) -> list[str]:
        """The blocks that the config gives it; none where its profile or its device decides."""
        return self.blocks or ([self.block] if self.block not in (None, AUTO) else [])  # type: ignore[list-item]

    def there(self, number: int) -> bool:
        """Whether it can take part in this round."""
        return self.joins <= number and (self.leaves is None or number <= self.leaves)


class LoraConfig(Section):
    """The adapter. Its scale s is the same for all clients, whatever their rank.

    `scale` is alpha / rank; with `rslora` s is alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732). `ranks` are those
    of single modules: a client has at most its own rank of it. `start` is a folder with a PEFT LoRA adapter to start
    from.
    """

    rank: int = Field(8, ge=1)
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    scale: float = Field(2.0, gt=0)
    rslora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    start: LocalPath | None = None
    targets: list[str] | None = Field(
        None, min_length=1, description="linear layers by the last part of their names; all of them if not given"
    )

    @property
    def scaling(self) -> float:
        """s: what B·A is multiplied by."""
        return self.scale * self.rank**0.5 if self.rslora else self.scale

    @model_validator(mode="after")
    def _ranks_fit(self) -> LoraConfig:
        for name, rank in self.ranks.items():
            if self.targets is not None and name not in self.targets:
                raise ValueError(f"ranks: {name!r} is not among the targets;{nearest(name, self.targets)}")
            if rank > self.rank:
                raise ValueError(f"ranks: {name!r} has rank {rank}; at most lora.rank, {self.rank}")
        return self


class TrainConfig(OpenSection):
    """One client's training in one round: AdamW, anew each round, or another trainer with its own settings.

    It stops at the first of `steps`, `epochs`, `tokens` and `seconds`. The learning rate follows the steps of all
    rounds, alone and in the personal step those that the client makes in the whole run: `constant_linear` is constant
    and falls linearly to zero over the last half, `cosine` falls from the start, `constant` stays, so that more rounds
    later change nothing. Where `seconds` end a training nobody knows before, and rates are those of all its steps.
    """

    named: ClassVar[str] = "trainer"
    registry: ClassVar[Registry[Any]] = TRAINERS

    trainer: str = "adamw"
    steps: int = Field(8, ge=1)
    epochs: float | None = Field(None, gt=0, description="passes over the client's examples, at most")
    tokens: int | None = Field(None, ge=1, description="tokens trained on, at most")
    seconds: float | None = Field(None, gt=0, description="a device's time budget; the result depends on its speed")
    batch_size: int = Field(8, ge=1, le=100_000, description="examples a step")
    micro_batch_tokens: int = Field(2048, ge=1, description="tokens at once, at most; a larger batch accumulates")
    learning_rate: float = Field(2e-3, gt=0, description="in a run, what its scheme asks for by default")
    schedule: Literal["constant_linear", "cosine", "constant"] = "constant_linear"
    warmup_steps: int = Field(0, ge=0, description="steps of the whole run over which the learning rate rises")
    clip_norm: float = Field(1.0, gt=0)
    max_length: int = Field(512, ge=8, description="tokens of an example, at most")
    turns: Literal["last", "all"] = Field(
        "last", description="of a conversation: its last answer, or each of the assistant's, with all before as prompt"
    )
    long_examples: Literal["truncate", "refuse"] = Field(
        "truncate", description="truncated ones lose the start of their question"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for a third more work, of all clients")


class EvaluateConfig(Section):
    """What is measured, and who may: `everyone` scores on everyone's data, which only a simulation can; with `own` a
    client scores its own data only, and the LLM is scored on the server's own rows (`server_data`), or not at all.
    """

    batch_size: int = Field(16, ge=1)
    every: int = Field(
        1, ge=1, description="rounds from one scoring to the next; those between have no scores. The last is scored"
    )
    local_only: bool = Field(True, description="also train each client alone for as many steps in all")
    scores: Literal["everyone", "own"] = "everyone"
    others: int | None = Field(
        None, ge=0, description="other clients whose data a block is scored on; all of up to 16 clients, else 8 of them"
    )
    server_data: str | list[str] | None = Field(
        None, description="scores own: rows of the server's own, with the fields of `data`, for the LLM"
    )

    @model_validator(mode="after")
    def _own_data(self) -> EvaluateConfig:
        for name in ("others", "server_data"):
            other = {"others": "everyone", "server_data": "own"}[name]
            if getattr(self, name) is not None and self.scores != other:
                raise ValueError(f"{name}: is for scores {other!r}; take it out, or set that")
        return self


class ReportConfig(Section):
    """Where a run's figures go after each round: losses, exact matches, bytes, epsilon, how many clients are missing.

    A tracker that cannot be reached ends no run: that is said, and the next round tries again.
    """

    tensorboard: bool = Field(False, description="event files in the run folder's `tensorboard`")
    mlflow: bool = Field(False, description="a run at MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME (legolm)")
