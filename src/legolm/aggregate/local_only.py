"""Local only: nobody's update is sent anywhere; each client trains its own block alone for all its steps.

The baseline that a federation has to beat. The rounds are passed over; the global adapter stays as it starts.
"""

from __future__ import annotations

from legolm.aggregate.factors import FactorSum
from legolm.aggregate.scheme import scheme


@scheme("local_only")
class LocalOnly(FactorSum):
    """Nothing is ever added to it."""
