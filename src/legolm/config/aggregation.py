"""The sections `aggregate` and `federation`: how updates become one, and who sends what when."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from legolm.config.blocks import ProtectConfig
from legolm.config.registry import SCHEMES, Registry
from legolm.config.section import LocalPath, OpenSection, Section

Codec = Literal["none", "bf16", "int8"]


class OutlierConfig(Section):
    """Updates whose size (root mean square of Δ) is above `factor` times the median size of all earlier rounds.

    Earlier rounds, because an update is added as it comes: the first round has nothing to compare with.
    """

    action: Literal["none", "clip", "refuse"] = "none"
    factor: float = Field(3.0, gt=1)


ADAPTIVE_RATE = 0.01
"""What FedAdam and FedYogi move an entry by in a round, about: the size of a client's change of it."""


class ServerConfig(Section):
    """How far the server goes along a round's result, whatever the scheme; an optimizer is for schemes that sum."""

    server_learning_rate: float | None = Field(
        None, gt=0, description=f"1 if not given; with fedadam and fedyogi, which divide by its size, {ADAPTIVE_RATE}"
    )
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    server_momentum: float = Field(0.9, ge=0, lt=1)
    server_beta2: float = Field(0.99, ge=0, lt=1)
    server_tau: float = Field(1e-3, gt=0, description="adaptivity of fedadam and fedyogi")

    @property
    def eta(self) -> float:
        """η, the server's learning rate."""
        adaptive = self.server_optimizer in ("fedadam", "fedyogi")
        return self.server_learning_rate or (ADAPTIVE_RATE if adaptive else 1.0)


WEIGHT_CAP = 0.5
"""No client outweighs all others together."""


class AggregateConfig(OpenSection, ServerConfig):
    """How updates become one. `heteagg` is the paper's; docs/aggregation.md has the table of schemes.

    A scheme's own settings (`form`, `trim`) stand here too; they are those of its signature.
    """

    model_config = OpenSection.model_config
    named: ClassVar[str] = "scheme"
    registry: ClassVar[Registry[Any]] = SCHEMES

    scheme: str = "heteagg"
    weight: Literal["examples", "equal", "capped"] = Field(
        "capped", description="how much a client counts: by its examples, as any other, or by examples up to weight_cap"
    )
    weight_cap: float = Field(
        WEIGHT_CAP,
        gt=0,
        le=1,
        description="of a round's weight, at most; fewer than 1 / weight_cap clients count alike",
    )
    outliers: OutlierConfig = OutlierConfig()
    start: LocalPath | None = Field(None, description="run folder whose best global adapter this run starts from")

    @model_validator(mode="after")
    def _cap_is_used(self) -> AggregateConfig:
        if self.weight != "capped" and self.weight_cap != WEIGHT_CAP:
            raise ValueError(f"weight_cap {self.weight_cap:g} is of weight 'capped'; weight {self.weight!r} has none")
        return self


class SuperLinkConfig(Section):
    """Where devices of their own (engine `deployment`) meet: a SuperLink that the run starts, or one that is there.

    `home` is the folder of `legolm certs init`, with the certificates and the register of devices.
    """

    home: LocalPath = "federation"
    host: str = Field("0.0.0.0", description="address of this machine to listen at; 0.0.0.0 is all")
    port: int = Field(8000, ge=1, le=65535)
    address: str | None = Field(
        None, pattern=r"^.+:[0-9]{1,5}$", description="HOST:PORT of a SuperLink that is there; its register counts"
    )
    root_certificates: LocalPath | None = Field(None, description="of `address`: its CA; the system's if not given")

    @model_validator(mode="after")
    def _of_address(self) -> SuperLinkConfig:
        if self.root_certificates is not None and self.address is None:
            raise ValueError("root_certificates: is for `address`; the certificates of its own are in `home`")
        if self.address is not None and not 0 < int(self.address.rpartition(":")[2]) < 1 << 16:
            raise ValueError(f"address {self.address!r}: a port is a number of 1 to 65535")
        return self


class FederationConfig(Section):
    """Who runs the rounds, how many, who takes part and what travels.

    `mode` has the two ends that a federation lies between: `alone`, where nobody's update goes anywhere and each client
    trains its own block for all its steps, and `pooled`, where the LLM trains at one place on everyone's data.
    """

    mode: Literal["federated", "alone", "pooled"] = "federated"
    engine: Literal["flower", "local", "deployment"] = Field(
        "flower", description="Flower's simulation, this process, or devices of their own (docs/deployment.md)"
    )
    superlink: SuperLinkConfig = SuperLinkConfig()
    rounds: int = Field(3, ge=1, le=100_000)
    threads: int = Field(1, ge=1, le=1024, description="CPU threads a client")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients that are there, drawn anew each round")
    capable: bool = Field(False, description="only clients that hold the whole LLM take part in the rounds")
    deadline_s: float | None = Field(None, gt=0, description="later replies of a round are dropped")
    min_replies: int = Field(
        1, ge=1, description="with fewer updates a round is none: the run stops, or asks devices of their own again"
    )
    buffer: int | None = Field(
        None,
        ge=1,
        description="asynchronous: a round is over with so many updates, others come later and count less by their age",
    )
    codec: Codec = Field("none", description="of the factors on the wire, both ways: fp32, bf16, or int8 a rank row")
    error_feedback: bool = Field(True, description="a client adds what the codec or mask lost to its next update")
    keep_updates: bool = Field(False, description="keep every accepted update in its round's folder (legolm ablate)")
    personal_steps: int = Field(0, ge=0, description="own steps of each client after the last global update")
    personal: Literal["last", "mixture", "by_input"] = Field(
        "last",
        description="what a client ends with: what it had last, or the mixture of the global update, its own steps "
        "after it and what it learned alone (evaluate.local_only) that its validation data choose; by_input: the "
        "best of these for questions like its own, and the global update for others",
    )
    public: str = Field(
        "starter",
        description="questions that by_input tells a client's own from: a starter set's public part, or files of rows",
    )
    quorum: bool = Field(
        False,
        description="of the global update the LLM takes what as many clients hold as its validation loss chooses: any, "
        "half, three quarters or all of them",
    )
    regmean: bool = Field(
        False,
        description="fit what the LLM takes of the global update to the clients' sums: each one's text is to get what "
        "its own block's slice gives it, not others' changes of units that it lacks",
    )
    protect: ProtectConfig | None = Field(
        None, description="text on which the LLM is to stay what it was; needs the clients' sums"
    )

    def drawn(self, there: int) -> int:
        """How many of so many clients a round asks."""
        return min(there, max(math.ceil(self.fraction * there), self.min_replies))

    @property
    def fitted(self) -> bool:
        """Whether the LLM takes of the global update what the clients' sums leave of it."""
        return self.regmean or self.protect is not None
