"""The sections `aggregate` and `federation`: how updates become one, and who sends what when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from legolm.config.section import LocalPath, Section

SchemeName = Literal[
    "heteagg",
    "fedavg",
    "fedprox",
    "hetlora",
    "flexlora",
    "flora",
    "fedex_lora",
    "raflora",
    "trimmed_mean",
    "median",
    "local_only",
    "centralized",
]
Codec = Literal["none", "bf16", "int8"]


class OutlierConfig(Section):
    """Updates whose size (root mean square of Δ) is above `factor` times the median size of all earlier rounds.

    Earlier rounds, because an update is added as it comes: the first round has nothing to compare with.
    """

    action: Literal["none", "clip", "refuse"] = "none"
    factor: float = Field(3.0, gt=1)


class AggregateConfig(Section):
    """How updates become one. `heteagg` is the paper's; docs/aggregation.md has the table of schemes."""

    scheme: SchemeName = "heteagg"
    form: Literal["factor", "exact", "frozen_side"] = Field(
        "frozen_side", description="heteagg: what is averaged; other schemes have `factor`"
    )
    denominator: Literal["coverage_mean", "global_fill"] = Field(
        "coverage_mean", description="heteagg: mean over those who hold an entry, or over all"
    )
    mask: Literal["structure", "saliency"] = Field(
        "structure", description="heteagg: saliency sends the (1 - sparsity) largest changes of each tensor"
    )
    residual: Literal["feedback", "fold", "drop"] = Field(
        "feedback", description="heteagg exact: what happens to the product beyond lora.rank"
    )
    residual_rank: int = Field(32, ge=1, description="heteagg exact: rank of the product that the server keeps")
    server_learning_rate: float = Field(1.0, gt=0)
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    server_momentum: float = Field(0.9, ge=0, lt=1)
    server_beta2: float = Field(0.99, ge=0, lt=1)
    server_tau: float = Field(1e-3, gt=0, description="adaptivity of fedadam and fedyogi")
    proximal: float = Field(0.01, gt=0, description="fedprox: μ")
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed_mean: share left out at each end")
    outliers: OutlierConfig = OutlierConfig()
    start: LocalPath | None = Field(None, description="run folder whose best global adapter this run starts from")

    @model_validator(mode="before")
    @classmethod
    def _form_by_scheme(cls, value: Any) -> Any:
        return value | {"form": form_of(value)} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _options_fit(self) -> AggregateConfig:
        fields = type(self).model_fields
        owners = dict.fromkeys(("form", "denominator", "mask"), "heteagg")
        for name, scheme in (owners | {"proximal": "fedprox", "trim": "trimmed_mean"}).items():
            usual = "factor" if name == "form" else fields[name].default
            if self.scheme != scheme and getattr(self, name) != usual:
                raise ValueError(f"{name} {getattr(self, name)!r} is {scheme}'s; scheme {self.scheme!r} has none")
        for name in ("residual", "residual_rank"):
            if self.form != "exact" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} {getattr(self, name)!r} is of form 'exact'; form {self.form!r} has none")
        if self.form == "exact" and self.mask == "saliency":
            raise ValueError("mask 'saliency' is on factors; form 'exact' aggregates products: take mask structure")
        if self.server_optimizer != "none":
            if self.form == "exact":
                raise ValueError(
                    f"server_optimizer {self.server_optimizer!r} needs the dense product's moments with form 'exact'; "
                    "take form factor or frozen_side, or server_optimizer none"
                )
            if self.scheme not in ("heteagg", "fedavg", "fedprox"):
                raise ValueError(
                    f"server_optimizer {self.server_optimizer!r} is for heteagg, fedavg and fedprox; "
                    f"scheme {self.scheme!r} has its own step"
                )
        return self


def form_of(aggregate: Mapping[str, Any]) -> Any:
    """The form that a raw section `aggregate` gives or, without one, that its scheme has."""
    return aggregate.get("form", "frozen_side" if aggregate.get("scheme", "heteagg") == "heteagg" else "factor")


class FederationConfig(Section):
    """Who runs the rounds, how many, who takes part and what travels."""

    engine: Literal["flower", "local"] = "flower"
    rounds: int = Field(3, ge=1)
    threads: int = Field(1, ge=1, description="CPU threads a client")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients that are there, drawn anew each round")
    capable: bool = Field(False, description="only clients that hold the whole LLM take part in the rounds")
    deadline_s: float | None = Field(None, gt=0, description="later replies of a round are dropped")
    min_replies: int = Field(1, ge=1, description="stop the run when fewer updates than this are accepted")
    codec: Codec = Field("none", description="of the factors on the wire, both ways: fp32, bf16, or int8 a rank row")
    error_feedback: bool = Field(True, description="a client adds what the codec lost to its next update")
    keep_updates: bool = Field(False, description="keep every accepted update in its round's folder (legolm ablate)")
    personal_steps: int = Field(0, ge=0, description="own steps of each client after the last global update")
