"""What schemes share that keep one global adapter and make it anew at the end of a round."""

from __future__ import annotations

from abc import abstractmethod

from legolm.adapter import GlobalAdapter, Tensors, slice_factors, under_prefix, with_prefix
from legolm.aggregate.scheme import Scheme, Start
from legolm.aggregate.weight import EntryWeight
from legolm.block import Coverage
from legolm.config import AggregateConfig


class OneAdapter(Scheme):
    """The factors (float32), and the weights behind them; `_round` holds the round's weights."""

    def __init__(self, start: Start, config: AggregateConfig) -> None:
        self._start, self._config = start, config
        self._factors = dict(start.factors)
        self._total = EntryWeight(start.shape, start.rank)
        self._reset()

    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The block's slice of the global adapter: its first `rank` rank rows."""
        return slice_factors(coverage, self._factors, rank)

    def finish(self) -> GlobalAdapter:
        """Make the new adapter and begin a round."""
        self._make()
        self._total.merge(self._round)
        self._reset()
        return GlobalAdapter(
            dict(self._factors), self._total.expand(self._factors), self._start.rank, self._start.scale
        )

    def state(self) -> Tensors:
        """Factors by key, and the weights under `weight.`."""
        return self._factors | with_prefix("weight", self._total.state())

    def load_state(self, state: Tensors) -> None:
        """Go on from `state()`."""
        self._factors = {key: state[key] for key in self._factors}
        self._total.load_state(under_prefix("weight", state))

    @abstractmethod
    def _make(self) -> None:
        """Set the factors from what was added."""

    def _reset(self) -> None:
        self._round = EntryWeight(self._start.shape, self._start.rank)
