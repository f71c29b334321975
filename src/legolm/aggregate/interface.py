"""What an aggregation scheme is, and how one registers itself."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from legolm.adapter import Change, Tensors
from legolm.block import Coverage
from legolm.config import SCHEMES, AggregateConfig, Entry, ServerConfig, guarded
from legolm.errors import LegolmError
from legolm.models import Shape

STATISTIC = ("changes", "weight")
"""What a scheme that is a plain function takes: changes (clients, rows, columns), weight (clients,), both float64."""


@dataclass(frozen=True)
class Start:
    """Where a run starts: in the coordinates of an LLM of this shape, with factors that `make` gives when asked.

    `seed` made those that nobody sends. `server` says how far a round goes. `arrived` gives factors as clients get
    them, after a codec that may lose something.
    """

    shape: Shape
    make: Callable[[], Tensors]
    rank: int
    seed: int = 0
    server: ServerConfig = field(default_factory=ServerConfig)
    arrived: Callable[[Tensors], Tensors] = dict


class Scheme(ABC):
    """Adds changes as they arrive; order does not matter beyond rounding. Knows tensors and coverage, no transport.

    Made of its settings alone; `begin` puts it at a start or at a saved state. A client trains `payload` and, where
    `derived_seed` is given, the factors that it makes itself from that seed (`adapter.initial_factors`); its base is
    the block plus every `fold` it got. `adapter` is all of that as one adapter: what a block is scored and merged with;
    the LLM is with `whole`.

    What it can and needs it says itself, in the attributes below: no other file knows its name.
    """

    unequal: Literal["no", "rank", "block"] = "block"
    """What may differ between clients: nothing, the LoRA rank of dense clients, or the block."""
    dense: bool = False
    """Works on clients that hold the whole LLM only."""
    streams: bool = True
    """A round's memory is the same for any number of clients."""
    sums: bool = False
    """A round is one weighted sum over clients, entry by entry: the server need not see single changes."""
    folds: bool = False
    """Rounds change the clients' base (`fold`)."""
    basis_stays: bool = True
    """A round's factors are those of the round before, moved: what a codec lost of a change can be added to the next
    one. Not where each round makes other factors, by an SVD or afresh."""
    frozen_side: bool = False
    """Only the factor on the side that blocks cut trains and travels; the other is made from the seed."""
    whitened: str | None = None
    """Of the frozen ones those that read the hidden state are made of this text (`side`), not from the seed alone."""
    fresh: bool = False
    """In each round a client trains an adapter of its own, made anew from the seed and its name: none is sent."""
    module_ranks: bool = False
    """Takes modules of other ranks than the run's (`lora.ranks`)."""
    optimizers: bool = False
    """Takes a server optimizer."""
    learning_rate: float = 2e-3
    """What its clients train at where the config does not say."""
    proximal: float = 0.0
    """FedProx's μ for the client's training."""
    derived_seed: int | None = None
    """Seed of the factors that are not sent; None: all are sent. May change with rounds."""

    @property
    def takes_late(self) -> bool:
        """Whether a change of an earlier round's factors can be added to today's: one sum of the same factors."""
        return self.sums and self.basis_stays and not self.folds

    @abstractmethod
    def begin(self, start: Start, state: Tensors | None = None) -> None:
        """At the start of a run, or where `state()` was taken."""

    @abstractmethod
    def payload(self, coverage: Coverage, rank: int) -> Tensors:
        """The factors that a client of this coverage and rank receives, in its block's slice."""

    def side(self, coverage: Coverage, rank: int) -> Tensors:
        """The frozen factors that a client cannot make, in the block's slice: it has them with its block."""
        return {}

    def fold(self, coverage: Coverage, since: int) -> Tensors:
        """The change of the base (factors A and B of any rank) that rounds after `since` made, in the block's slice."""
        return {}

    def fold_seeds(self, since: int) -> list[int]:
        """Seeds of the frozen sides of `fold`, of the run's rank each, which clients make; empty: they get it whole."""
        return []

    def fold_rank(self, ranks: Sequence[int], rank: int) -> int:
        """Rank of what a round with clients of these ranks, in a run of this rank, adds to everyone's download.

        With a frozen side it takes the place of the factors there, of which clients make the new ones.
        """
        return 0

    def held_rank(self, ranks: Sequence[int], rank: int, rounds: int) -> int:
        """Rank of the products that `state` holds beside the factors after so many rounds of clients of these ranks."""
        return 0

    def keep(self, sparsity: float) -> float:
        """Share of its change's entries, the largest, that a client sends whose block's masks have this sparsity."""
        return 1.0

    def weighs(self) -> bool:
        """Whether a client counts by its weight (`Change.examples`); else in a way of the scheme's own."""
        return True

    def outvoted(self, holders: int) -> int | None:
        """How many liars among so many holders of an entry cannot move it far; None: the scheme resists none."""
        return None

    def adapter(self, coverage: Coverage, rank: int) -> Tensors:
        """What a block of this coverage is evaluated with; all modules share one rank, which may be another."""
        return self.payload(coverage, rank)

    def whole(self, coverage: Coverage, rank: int) -> Tensors:
        """What the LLM is evaluated and written with: all that the server knows, of whatever rank.

        `coverage` is the LLM's, `rank` the run's, for schemes that know no more than they send.
        """
        return self.adapter(coverage, rank)

    @abstractmethod
    def add(self, change: Change, coverage: Coverage) -> None:
        """Add one checked change of a block with this coverage."""

    def disturb(self, noise: Callable[[Sequence[int]], Tensor]) -> None:
        """Where a scheme `sums`: add to the round's sum what `noise` gives for a shape (float64), on every entry."""
        raise NotImplementedError

    def only(self, entries: Tensors) -> None:
        """Where a scheme `sums`: of this round's sum these entries (bool by factor key, in the LLM's coordinates) are
        known, and no other may move. A scheme that moves none by a sum of zero has nothing to do."""
        return

    @abstractmethod
    def finish(self) -> None:
        """End the round: the new global adapter. Without any change it is the old one."""

    @abstractmethod
    def state(self) -> Tensors:
        """All that the next round needs, between rounds; factors by their keys, the rest under other prefixes."""


METHODS = [name for name, value in vars(Scheme).items() if callable(value) and not name.startswith("_")]


def scheme(name: str) -> Callable[[Callable[..., Any]], Entry[Scheme]]:
    """Register a scheme under the name that configs use; its keyword-only parameters are its settings.

    What is decorated is a class or function that makes a `Scheme` of its settings, or a plain statistic
    `f(changes, weight, *, ...)`: over the clients' changes (clients, rows, columns) of one factor, NaN where a client
    holds nothing, and what each counts (clients,; `aggregate.weight`), both float64, it gives (rows, columns). Raises
    `LegolmError` for a name that is taken and for a signature that is neither.
    """

    def register(made_of: Callable[..., Any]) -> Entry[Scheme]:
        first = next(iter(inspect.signature(made_of).parameters.values()), None)
        is_maker = inspect.isclass(made_of) or first is None or first.kind is first.KEYWORD_ONLY

        def make(**settings: Any) -> Scheme:
            from legolm.aggregate.robust import Statistic

            if not is_maker:
                return Statistic(name, partial(guarded(f"scheme {name!r}", made_of), **settings))
            made = made_of(**settings)
            if not isinstance(made, Scheme):
                raise LegolmError(f"scheme {name!r}: makes a {type(made).__name__}; it must make a Scheme")
            for method in METHODS:  # what a rehearsal cannot try may still go wrong in a round
                setattr(made, method, guarded(f"scheme {name!r}", getattr(made, method), made_of.__module__))
            return made

        return SCHEMES.register(name, made_of, make, () if is_maker else STATISTIC)

    return register


def make_scheme(config: AggregateConfig) -> Scheme:
    """The configured scheme, before any start."""
    made: Scheme = SCHEMES.entry(config.scheme).make(**config.settings)
    return made


def factors_in(state: Tensors) -> Tensors:
    """Of a state the global adapter's factors."""
    return {key: tensor for key, tensor in state.items() if key.startswith("layers.")}


Statistics = Callable[[Tensor, Tensor], Tensor]
