"""The section `privacy`: what hides a client's update from the server."""

from __future__ import annotations

from legolm.config.dp import DpConfig
from legolm.config.section import Section


class PrivacyConfig(Section):
    """Nothing is hidden by default: the server sees each client's change (docs/privacy.md)."""

    dp: DpConfig = DpConfig()
