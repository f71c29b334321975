"""The section `privacy.dp`: differential privacy, of clients or of examples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from legolm.config.section import Section


class DpConfig(Section):
    """Clipping and Gaussian noise with an account of (ε, δ); docs/privacy.md says what it covers.

    `client`: what one client sent to all rounds cannot be told from nothing. `example`: the same of one training
    example of a client, by DP-SGD there.
    """

    level: Literal["none", "client", "example"] = Field("none", description="what is hidden")
    noise: Literal["central", "distributed"] = Field(
        "central",
        description="of level client: the server adds it to the sum, or each client its part before it sends",
    )
    clip: float = Field(
        1.0, gt=0, description="L2 norm of a client's change over all that it holds, or of an example's gradient"
    )
    noise_multiplier: float | None = Field(
        None, ge=1e-9, description="standard deviation of the noise over `clip`; what `epsilon` asks for if not given"
    )
    epsilon: float | None = Field(
        None, gt=0, description="budget: no round that would pass it is made; without noise_multiplier also the target"
    )
    delta: float = Field(1e-5, gt=0, lt=1)
    dropouts: int = Field(
        0, ge=0, description="of noise distributed: clients of a round without whose parts the noise is still enough"
    )

    @model_validator(mode="after")
    def _fits(self) -> DpConfig:
        given = [name for name in ("noise_multiplier", "epsilon") if getattr(self, name) is not None]
        if self.level == "none":
            if given:
                raise ValueError(f"{given[0]} is of level client or example; level none adds no noise")
            return self
        if not given:
            raise ValueError(f"level {self.level} needs noise_multiplier, or epsilon to find it by")
        if self.noise == "distributed" and self.level != "client":
            raise ValueError("noise distributed is of level client; at level example each client's is its own already")
        if self.dropouts and self.noise != "distributed":
            raise ValueError("dropouts is of noise distributed; the server's own noise does not drop out")
        return self
