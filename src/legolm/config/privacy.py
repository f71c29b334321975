"""The section `privacy`: what hides a client's update from the server."""

from __future__ import annotations

from pydantic import Field

from legolm.config.dp import DpConfig
from legolm.config.section import Section


class SecureConfig(Section):
    """Secure sums: the server learns what the clients' changes add up to where enough of them hold an entry, and no
    single change. Entries of fewer holders are never sent.
    """

    colluders: int = Field(
        1, ge=0, description="clients that may tell the server all they know; an entry opens with 2 more, 3 at least"
    )
    withheld_limit: float = Field(
        0.1, ge=0, le=1, description="share of the entries that may have too few holders; above it the run is refused"
    )

    @property
    def least(self) -> int:
        """Holders that an entry needs."""
        return max(3, self.colluders + 2)


class PrivacyConfig(Section):
    """Nothing is hidden by default: the server sees each client's change (docs/privacy.md)."""

    secure: SecureConfig | None = Field(None, description="`{}` for secure sums with their defaults")
    dp: DpConfig = DpConfig()
