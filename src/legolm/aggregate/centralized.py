"""Centralized: one dense LLM trained on all clients' data at one place, with the tokens of all clients together.

No federation, no privacy: what is there to lose by federating. `rounds` has the server train it as one client.
"""

from __future__ import annotations

from legolm.aggregate.factors import FactorSum
from legolm.aggregate.scheme import scheme


@scheme("centralized")
class Centralized(FactorSum):
    """Its one update is the round's result."""
