"""A whole run's configuration, and what of its sections does not go together."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from legolm.config.aggregation import AggregateConfig, FederationConfig
from legolm.config.blocks import CLIENTS, BlockConfig
from legolm.config.privacy import PrivacyConfig
from legolm.config.registry import SCHEMES, TRAINERS, load_plugins
from legolm.config.section import LocalPath, Section
from legolm.config.sections import (
    AUTO,
    ClientConfig,
    DataConfig,
    Device,
    EvaluateConfig,
    LoraConfig,
    ReportConfig,
    TrainConfig,
)
from legolm.errors import nearest

LEAST_RECOVERY, MOST_RECOVERY = 16, 40
"""Steps of recovery by default: none where the rounds have fewer than the first, and never more than the second."""


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
    final: LocalPath | None = Field(None, description="new folder for the final models, for instance on another disk")
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
    report: ReportConfig = ReportConfig()

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

    @field_validator("final")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        return value and str(Path(value).absolute())

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
        alone = self.evaluate.local_only and federation.personal != "last"
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
        self._check_calibration()
        self._check_quorum()
        self._check_by_input()
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

    def _check_by_input(self) -> None:
        """Raise `ValueError` where there is nothing to choose, or nobody who could write what tells questions apart."""
        federation, why = self.federation, ""
        if federation.personal != "by_input":
            return
        if not self.own_parts:
            why = "chooses between the global update and what a client learned by itself; set "
            why += "federation.personal_steps, or evaluate.local_only to true, in mode federated"
        elif federation.engine == "deployment":
            why = "keeps with each final model what its questions are like, which a device does not show; take mixture"
        if why:
            raise ValueError(f"federation.personal: by_input {why}")

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
            if not TRAINERS.entry(self.train.trainer).make(**self.train.settings).private:
                why = f"is DP-SGD, which train.trainer {self.train.trainer!r} does not do; "
                why += f"take one of {TRAINERS.having('private')}"
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
        elif aggregate.outliers.action != "none":
            why = "shows no single change to judge; set aggregate.outliers.action to none"
        elif federation.mode != "federated" or self.evaluate.local_only or federation.personal_steps:
            why = "has no training of its own; set federation.mode to federated, evaluate.local_only to false and "
            why += "federation.personal_steps to 0"
        if why:
            raise ValueError(f"clients: {relays[0].id!r}: a relay {why}")

    def _check_calibration(self) -> None:
        """Raise `ValueError` where clients are asked for sums of their text, and cannot be, or are to hide such."""
        asking = [block for block in self.blocks if block.calibration.statistics == CLIENTS]
        federation, why = self.federation, ""
        if federation.fitted:
            if not asking:
                why = "needs the clients' sums: give blocks calibration.statistics: clients"
            elif federation.mode == "alone":
                why = "is for the LLM, which learns nothing in mode alone; take it out"
            elif federation.regmean and (federation.mode == "pooled" or federation.capable):
                why = "is of what each client's block lacks, and not all of them train; set it to false"
            elif federation.regmean and any(one.block == AUTO or one.blocks or one.layers for one in self.clients):
                why = "needs to know what each client holds from the start on, and trains; give each one `block`, whole"
            if why:
                raise ValueError(f"federation.{'regmean' if federation.regmean else 'protect'}: {why}")
        if not asking:
            if SCHEMES.entry(self.aggregate.scheme).make(**self.aggregate.settings).whitened == CLIENTS:
                raise ValueError(
                    f"aggregate.whiten {CLIENTS!r}: needs their sums: give blocks calibration.statistics: {CLIENTS}, "
                    "or name public text"
                )
            return
        why, first = "", asking[0].calibration
        if self.privacy.secure is not None or self.privacy.dp.level != "none":
            why = "sends each client's sums in the open, without noise; take privacy.secure and privacy.dp out, or text"
        elif any(client.relay for client in self.clients):
            why = "asks devices, and a relay has no text of its own; take `relay` out, or text"
        elif any(
            (one.calibration.samples, one.calibration.length, one.calibration.sketch)
            != (first.samples, first.length, first.sketch)
            for one in asking
        ):
            why = "asks once for all blocks; give them the same samples, length and sketch"
        if why:
            raise ValueError(f"blocks: {asking[0].name!r}: calibration.statistics {CLIENTS!r} {why}")

    def _check_quorum(self) -> None:
        """Raise `ValueError` where the LLM's validation loss cannot choose of what clients hold."""
        if not self.federation.quorum:
            return
        why = ""
        if self.federation.mode == "alone":
            why = "is for the LLM, which learns nothing in mode alone"
        elif self.evaluate.scores == "own":
            why = "needs all clients' validation data, and evaluate.scores is own"
        elif any(client.blocks for client in self.clients):
            why = "counts who holds what, and clients here change their blocks"
        if why:
            raise ValueError(f"federation.quorum {why}; set it to false")

    def _check_secure(self) -> None:
        """Raise `ValueError` for what needs single changes, which a secure sum hides, or shows them."""
        secure, federation, aggregate = self.privacy.secure, self.federation, self.aggregate
        if secure is None:
            return
        scheme, why = SCHEMES.entry(aggregate.scheme).make(**aggregate.settings), ""
        there, alone = len(self.clients), self.evaluate.local_only or federation.personal_steps
        drawn = federation.drawn(there)
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
        elif self.privacy.dp.level == "example":
            why = "tells nothing of clients' batches, by which level example is accounted; take privacy.dp.level client"
        elif self.privacy.dp.level == "client" and self.privacy.dp.noise == "central":
            why = "shows the server no single change to clip; take privacy.dp.noise distributed"
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
        if scheme.whitened is not None and self.federation.mode == "pooled":
            raise ValueError("aggregate.whiten: its factors come with blocks, and mode pooled has none; take it out")
        if start is not None and scheme.whitened is not None:
            raise ValueError(
                f"{start}: another run's factors stand beside other frozen ones; take aggregate.whiten out"
            )
        if start is not None and scheme.fresh:
            raise ValueError(f"{start}: scheme {name!r} begins with a fresh adapter; take another scheme")
