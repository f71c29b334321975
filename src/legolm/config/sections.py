"""Every field of a run's configuration with its default, meaning and check."""

from __future__ import annotations

import contextlib
import math
from datetime import date as Day
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from legolm.config.aggregation import AggregateConfig, FederationConfig
from legolm.config.blocks import BlockConfig
from legolm.config.privacy import PrivacyConfig
from legolm.config.registry import SCHEMES, TRAINERS, Registry, load_plugins
from legolm.config.section import Layer, LocalPath, Name, OpenSection, RowsConfig, Section, Share
from legolm.errors import nearest

AUTO = "auto"
"""In the place of a block's name: the largest that the client's device says it can hold."""
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


LEAST_RECOVERY, MOST_RECOVERY = 16, 40
"""Steps of recovery by default: none where the rounds have fewer than the first, and never more than the second."""


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

    It stops at the first of `steps`, `epochs`, `tokens` and `seconds`. The learning rate follows the steps that a
    client makes in the whole run, the personal step included: `constant_linear` is constant and falls linearly to zero
    over the last half, `cosine` falls from the start, `constant` stays, so that more rounds later change nothing.
    """

    named: ClassVar[str] = "trainer"
    registry: ClassVar[Registry[Any]] = TRAINERS

    trainer: str = "adamw"
    steps: int = Field(8, ge=1)
    epochs: float | None = Field(None, gt=0, description="passes over the client's examples, at most")
    tokens: int | None = Field(None, ge=1, description="tokens trained on, at most")
    seconds: float | None = Field(None, gt=0, description="a device's time budget; the result depends on its speed")
    batch_size: int = Field(8, ge=1, description="examples a step")
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


class SiteConfig(BaseModel):
    """What a simulated client reads of a run's config; the rest is the server's, and may name what is only there."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    model: str
    seed: int
    device: Device
    plugins: list[str]
    data: DataConfig
    clients: list[ClientConfig]
    federation: FederationConfig


class RunConfig(Section):
    """A whole run: what to cut, who trains on what, how updates are combined."""

    model: str = Field("starter", description="`starter`, a local folder or a Hugging Face hub id")
    plugins: list[str] = Field([], description="module:name of schemes, criteria and trainers that are not legolm's")
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of matrix products, `auto` measures; norms, adapters and sums stay fp32"
    )
    device: Device = "auto"
    data: DataConfig = DataConfig()
    blocks: list[BlockConfig] = Field(min_length=1)
    clients: list[ClientConfig] = Field(min_length=1)
    lora: LoraConfig = LoraConfig()
    # Made late: what they name registers itself in rooms that read configs.
    train: TrainConfig = Field(default_factory=TrainConfig)
    aggregate: AggregateConfig = Field(default_factory=AggregateConfig)
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _plugins_first(cls, value: Any) -> Any:
        """What the sections name may come from a plug-in; and a scheme knows the rate that its clients need."""
        if not isinstance(value, dict):
            return value
        plugins = value.get("plugins", [])
        if isinstance(plugins, list) and all(isinstance(one, str) for one in plugins):
            load_plugins(plugins)
        aggregate, train = value.get("aggregate", {}), value.get("train", {})
        if isinstance(aggregate, dict) and isinstance(train, dict) and "learning_rate" not in train:
            with contextlib.suppress(ValidationError):  # which the section itself will say
                chosen = AggregateConfig.model_validate(aggregate)
                rate = SCHEMES.entry(chosen.scheme).make(**chosen.settings).learning_rate
                return value | {"train": {"learning_rate": rate} | train}
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _data_by_name(cls, value: object) -> object:
        return {"train": value} if isinstance(value, str) else value

    @property
    def cuts(self) -> list[BlockConfig]:
        """The blocks, each with its recovery decided.

        One that says nothing gets as many steps as a client trains in the rounds, 40 at most: recovery is not to take
        longer than what it is for. Fewer than 16 are too few to be worth the LLM's memory, and none are made.
        """
        steps = min(self.federation.rounds * self.train.steps, MOST_RECOVERY)
        return [
            block.model_copy(update={"recover": block.recover.model_copy(update={"steps": steps})})
            if steps >= LEAST_RECOVERY and block.may_recover
            else block
            for block in self.blocks
        ]

    @property
    def own_parts(self) -> tuple[Literal["personal", "local"], ...]:
        """What a client's final model is made of beside the global update; without any there is no such stage."""
        federation = self.federation
        if federation.mode == "alone":
            return ()
        alone = self.evaluate.local_only and federation.personal == "mixture"
        return (*(("personal",) if federation.personal_steps else ()), *(("local",) if alone else ()))

    @model_validator(mode="after")
    def _names_fit(self) -> RunConfig:
        for kind, names in (
            ("blocks", [block.name for block in self.blocks]),
            ("clients", [client.id for client in self.clients]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind}: {twice[0]!r} is there twice; names must differ")
        known = [block.name for block in self.blocks]
        if AUTO in known:
            raise ValueError(f"blocks: {AUTO!r} stands for the block that a device can hold; give it another name")
        for client in self.clients:
            for name in client.named:
                if name not in known:
                    raise ValueError(f"clients: {client.id!r} wants block {name!r};{nearest(name, known)}")
            if client.rank is not None and client.rank > self.lora.rank:
                raise ValueError(f"clients: {client.id!r} has rank {client.rank}; at most lora.rank, {self.lora.rank}")
        if self.federation.mode == "alone" and not self.evaluate.local_only:
            raise ValueError("federation.mode 'alone' is the stage evaluate.local_only; set that to true")
        if self.federation.mode == "pooled" and self.evaluate.scores == "own":
            raise ValueError(
                "evaluate.scores 'own' is for data that stay where they are, and federation.mode 'pooled' trains on "
                "everyone's at one place; take scores everyone, or another mode"
            )
        self._check_scheme()
        self._check_devices()
        self._check_dp()
        self._check_secure()
        self._check_relays()
        for name in ("min_replies", "buffer"):
            if (getattr(self.federation, name) or 0) > len(self.clients):
                raise ValueError(
                    f"federation.{name} is {getattr(self.federation, name)}; there are {len(self.clients)} clients"
                )
        return self

    def _check_devices(self) -> None:
        """Raise `ValueError` for what only devices of their own can do, or cannot: nobody else has their rows."""
        if self.federation.engine != "deployment":
            asking = next((client.id for client in self.clients if client.block == AUTO), None)
            if asking is not None:
                raise ValueError(
                    f"clients: {asking!r}: block {AUTO} asks a device what it holds, and federation.engine "
                    f"{self.federation.engine!r} has none; give `profile`, or set the engine to deployment"
                )
            return
        if self.evaluate.scores != "own":
            raise ValueError(
                "evaluate.scores 'everyone' needs everyone's data at one place, and federation.engine 'deployment' "
                "leaves them on the devices; set evaluate.scores to own"
            )
        for name in ("validation", "test"):
            if not isinstance(getattr(self.data, name), float):
                raise ValueError(
                    f"data.{name}: is a share that each device holds out of its rows with federation.engine "
                    "'deployment', for instance 0.1"
                )

    def _check_buffer(self, takes_late: bool) -> None:
        """Raise `ValueError` where rounds cannot be asynchronous."""
        federation = self.federation
        if federation.mode != "federated":
            raise ValueError(f"federation.buffer: is for rounds, and mode {federation.mode!r} has none; take it out")
        if not takes_late:
            raise ValueError(
                f"federation.buffer: an update of an earlier round is added to today's factors, and scheme "
                f"{self.aggregate.scheme!r} with these settings makes others in each round, or adds no sums; take it "
                f"out, or take one of {SCHEMES.having('takes_late')}"
            )
        if federation.buffer is not None and federation.min_replies > federation.buffer:
            raise ValueError(
                f"federation.min_replies is {federation.min_replies}, and a round is over with federation.buffer "
                f"{federation.buffer} updates; lower it"
            )

    def _check_dp(self) -> None:
        """Raise `ValueError` for what would make the account of `privacy.dp` wrong."""
        dp, federation, why = self.privacy.dp, self.federation, ""
        if dp.level == "none":
            return
        scheme = SCHEMES.entry(self.aggregate.scheme).make(**self.aggregate.settings)
        if federation.mode != "federated":
            why = f"is of rounds, and federation.mode {federation.mode!r} has none; take mode federated"
        elif federation.buffer is not None:
            why = "counts the rounds that a client is drawn for, and federation.buffer adds it to others; take it out"
        elif dp.level == "example":
            if self.train.trainer != "adamw":
                why = f"is DP-SGD in the trainer adamw, and train.trainer is {self.train.trainer!r}"
            elif self.evaluate.local_only or federation.personal_steps:
                field = "evaluate.local_only" if self.evaluate.local_only else "federation.personal_steps"
                why = f"does not cover what clients train alone, which the server scores; set {field} to "
                why += "false" if self.evaluate.local_only else "0"
        elif not scheme.sums:
            why = f"adds noise to a sum, and aggregate.scheme {self.aggregate.scheme!r} makes none of these changes; "
            why += f"take one of {SCHEMES.having('sums')}"
        elif self.aggregate.weight != "equal":
            why = "bounds what each client adds, and numbers of examples are its data; set aggregate.weight to equal"
        elif self.aggregate.outliers.action != "none":
            why = "clips by itself, and whom aggregate.outliers refuses depends on data; set its action to none"
        elif federation.keep_updates:
            why = "would be beside clients' changes without noise; set federation.keep_updates to false"
        elif dp.delta >= 1 / len(self.clients):
            why = f"at delta {dp.delta:g} may show one of {len(self.clients)} clients whole; take a far smaller delta"
        elif dp.noise == "distributed":
            if federation.codec != "none" or scheme.keep(0.5) < 1:
                lossy = "aggregate.mask saliency" if federation.codec == "none" else f"codec {federation.codec}"
                why = f"noise distributed would be changed by {lossy}; take it out"
            elif self.evaluate.local_only or federation.personal_steps:
                why = "noise distributed does not cover what clients train alone, which the server scores; set "
                why += "evaluate.local_only to false and federation.personal_steps to 0"
            elif dp.dropouts >= len(self.clients):
                why = f"dropouts {dp.dropouts} leaves none of {len(self.clients)} clients"
        if why:
            raise ValueError(f"privacy.dp: {why}")

    def _check_relays(self) -> None:
        """Raise `ValueError` for what a relay's one change, the mean of its region's, cannot be."""
        relays = [client for client in self.clients if client.relay]
        if not relays:
            return
        federation, aggregate, why = self.federation, self.aggregate, ""
        scheme = SCHEMES.entry(aggregate.scheme).make(**aggregate.settings)
        if federation.engine != "deployment":
            why = f"is a process of its own, and federation.engine {federation.engine!r} has none; take `relay` out"
        elif any(client.block in (None, AUTO) for client in relays):
            why = "stands for devices with one block; give it a `block` by name"
        elif not scheme.takes_late or scheme.keep(0.5) < 1:
            why = (
                f"adds up changes, and aggregate.scheme {aggregate.scheme!r} with these settings needs each by itself; "
            )
            why += f"take one of {SCHEMES.having('takes_late')}, with aggregate.mask structure"
        elif aggregate.weight != "examples":
            why = (
                f"counts as all its devices' examples, and aggregate.weight is {aggregate.weight!r}; set it to examples"
            )
        elif self.privacy.secure is not None or self.privacy.dp.level != "none":
            why = "sees each change of its region and shows one for all; take privacy.secure and privacy.dp out"
        elif federation.mode != "federated" or self.evaluate.local_only or federation.personal_steps:
            why = "has no training of its own; set federation.mode to federated, evaluate.local_only to false and "
            why += "federation.personal_steps to 0"
        if why:
            raise ValueError(f"clients: {relays[0].id!r}: a relay {why}")

    def _check_secure(self) -> None:
        """Raise `ValueError` for what needs single changes, which a secure sum hides, or shows them."""
        secure, federation, aggregate = self.privacy.secure, self.federation, self.aggregate
        if secure is None:
            return
        scheme, why = SCHEMES.entry(aggregate.scheme).make(**aggregate.settings), ""
        there, alone = len(self.clients), self.evaluate.local_only or federation.personal_steps
        drawn = min(there, max(math.ceil(federation.fraction * there), federation.min_replies))
        if federation.mode != "federated":
            why = f"is of rounds, and federation.mode {federation.mode!r} has none; take mode federated"
        elif not scheme.sums:
            why = f"opens a sum of changes, and aggregate.scheme {aggregate.scheme!r} with these settings needs each "
            why += f"by itself; take one of {SCHEMES.having('sums')}"
        elif scheme.folds:
            why = "hashes what clients received into their masks, and a redrawn side sends them different things; take "
            why += "aggregate.redraw 0"
        elif scheme.keep(0.5) < 1:
            why = "is of the same entries of all holders, and a saliency mask chooses each client's own, which tells "
            why += "what it learned; take aggregate.mask structure"
        elif aggregate.outliers.action != "none":
            why = "shows the server no single change to judge; set aggregate.outliers.action to none"
        elif federation.keep_updates:
            why = "leaves no single change to keep; set federation.keep_updates to false"
        elif federation.codec != "none":
            why = f"sends numbers of its own, 16 bits an entry; take out federation.codec {federation.codec}"
        elif self.privacy.dp.level != "none":
            why = "has no noise of privacy.dp in it: set privacy.dp.level to none"
        elif federation.buffer is not None:
            why = "opens what the clients of one round add up to, and with federation.buffer they are of several; take "
            why += "that out"
        elif drawn < secure.least:
            who = f"a round has {drawn} clients" if drawn < there else f"there are {there} clients"
            why = f"with colluders {secure.colluders} opens an entry of {secure.least} holders or more, and {who}"
        elif federation.engine == "deployment" and alone:
            why = "hides no change of what clients train alone, which the server would get; set evaluate.local_only to "
            why += "false and federation.personal_steps to 0"
        if why:
            raise ValueError(f"privacy.secure: {why}")

    def _check_scheme(self) -> None:
        """Raise `ValueError` for what the scheme says that it does not take."""
        name = self.aggregate.scheme
        scheme = SCHEMES.entry(name).make(**self.aggregate.settings)
        optimizer = self.aggregate.server_optimizer
        if optimizer != "none" and not scheme.optimizers:
            raise ValueError(
                f"aggregate.server_optimizer {optimizer!r} needs a mean of the same factors in every round; scheme "
                f"{name!r} with these settings has its own step, or redraws them: take server_optimizer none, or one "
                f"of {SCHEMES.having('optimizers')}"
            )
        if self.federation.buffer is not None:
            self._check_buffer(scheme.takes_late)
        if self.lora.ranks and not scheme.module_ranks:
            raise ValueError(
                "lora.ranks: products of another rank in each module need sums of factors, and scheme "
                f"{name!r} with these settings has none; take out lora.ranks, or take one of "
                f"{SCHEMES.having('module_ranks')}"
            )
        if self.lora.start is not None and scheme.frozen_side:
            raise ValueError(
                f"lora.start: scheme {name!r} with these settings keeps random factors, and that adapter has others; "
                "take form factor or exact, or another scheme"
            )
        starts = {"lora.start": self.lora.start, "aggregate.start": self.aggregate.start}
        start = next((field for field, value in starts.items() if value is not None), None)
        if start is not None and scheme.fresh:
            raise ValueError(f"{start}: scheme {name!r} begins with a fresh adapter; take another scheme")
