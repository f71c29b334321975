"""How much each client counts in a round: by its examples, by them up to a stated share, or all alike.

Capped, client k of n_k examples has weight min(n_k, t), with the largest t that leaves nobody more than the share c of
all weights. Where n clients are too few for that (n · c <= 1) they all count the same. The t needs all counts of the
round, and updates are added as they come; but no more than 1/c clients can reach their cap, each with the share c. So
the updates of the 1/c clients with the most examples wait to the end of the round, and all others are added at once:
memory grows with 1/c, not with clients.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import replace

from legolm.adapter import Change
from legolm.aggregate.interface import Scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig


def capped(counts: Mapping[str, float], share: float) -> dict[str, float]:
    """Weights by client: the counts (at least 1), the largest lowered until nobody has more than `share` of the sum."""
    if len(counts) * share <= 1:
        return dict.fromkeys(counts, 1.0)
    most, left = math.inf, math.fsum(counts.values())
    for above, count in enumerate(sorted(counts.values(), reverse=True)):
        most = share * left / (1 - above * share)
        if count <= most:
            break
        left -= count
    return {client: min(count, most) for client, count in counts.items()}


class Weighing:
    """One round's changes on their way into the scheme, each with its client's weight (`aggregate.weight`)."""

    def __init__(self, config: AggregateConfig, scheme: Scheme) -> None:
        self._scheme, self._how, self._share = scheme, config.weight, config.weight_cap
        self._counts: dict[str, float] = {}
        self._waiting: list[tuple[float, str, Change, Coverage]] = []  # a heap: the fewest examples first
        self._most = math.ceil(1 / config.weight_cap) if config.weight == "capped" else 0

    def add(self, client: str, change: Change, coverage: Coverage) -> None:
        """Take a client's one change of the round."""
        count = 1.0 if self._how == "equal" else change.examples
        self._counts[client] = count
        heapq.heappush(self._waiting, (count, client, change, coverage))
        if len(self._waiting) > self._most:
            count, _, change, coverage = heapq.heappop(self._waiting)
            self._scheme.add(replace(change, examples=count), coverage)

    def finish(self) -> dict[str, float]:
        """Add what waits, and end the scheme's round. Gives each client's share of it, if the scheme weighs clients."""
        weights = capped(self._counts, self._share) if self._how == "capped" else self._counts
        for _, client, change, coverage in self._waiting:
            self._scheme.add(replace(change, examples=weights[client]), coverage)
        self._waiting = []
        self._scheme.finish()
        total = math.fsum(weights.values())
        return {client: weight / total for client, weight in weights.items()} if self._scheme.weighs() else {}
