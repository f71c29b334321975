"""Two rounds of a scheme on a small LLM: what a scheme from outside would break later is told before a run."""

from __future__ import annotations

import torch

from legolm.adapter import Change, Tensors, initial_factors, slice_factors
from legolm.aggregate.interface import Scheme, Start, make_scheme
from legolm.block import Coverage
from legolm.config import SCHEMES, AggregateConfig, foreign
from legolm.errors import LegolmError
from legolm.models import Shape

SHAPE = Shape("llama", layers=1, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
RANK = 2
WHOLE = Coverage.full(SHAPE)
PART = Coverage(SHAPE, (0,), ((1,),), ((0, 2),))


def rehearse(config: AggregateConfig) -> None:
    """Raise `LegolmError` when the configured scheme does not give an adapter of the shapes and numbers that it should.

    The first round has clients of different blocks and ranks as far as the scheme takes them, the second one of them,
    from a saved state.
    """
    where = f"aggregate.scheme {config.scheme!r}"
    with foreign(where, SCHEMES.entry(config.scheme).module):
        scheme = make_scheme(config)
        wanted = initial_factors(SHAPE, None, RANK, 0, scheme.frozen_side)
        start = Start(SHAPE, lambda: dict(wanted), RANK, 0, config)
        scheme.begin(start)
        other = PART if scheme.unequal == "block" and not scheme.dense else WHOLE
        clients = [(WHOLE, RANK), (other, RANK if scheme.unequal == "no" else 1)]
        for taking in (clients, clients[1:]):
            for coverage, rank in taking:
                scheme.add(_change(scheme, coverage, rank), coverage)
            scheme.finish()
            for found in (scheme.adapter(WHOLE, RANK), scheme.whole(WHOLE, RANK)):
                _check(where, found, wanted)
            state = scheme.state()
            scheme = make_scheme(config)
            scheme.begin(start, state)


def _check(where: str, found: Tensors, wanted: Tensors) -> None:
    if set(found) != set(wanted):
        raise LegolmError(f"{where}: its adapter has other factors than the run's start")
    for key, tensor in found.items():
        # Only the rank may be another: where the scheme folds, and where the server knows more than it sends.
        side = 1 if key.endswith("A") else 0
        if tensor.shape[side] != wanted[key].shape[side] or not bool(tensor.isfinite().all()):
            raise LegolmError(
                f"{where}: its adapter's {key} is {tuple(tensor.shape)} where the start's is "
                f"{tuple(wanted[key].shape)}, or not finite"
            )


def _change(scheme: Scheme, coverage: Coverage, rank: int) -> Change:
    """A random change of what a client of this coverage and rank receives."""
    made: Tensors = {}
    if scheme.derived_seed is not None:
        made = initial_factors(SHAPE, None, RANK, scheme.derived_seed, scheme.frozen_side)
    sent = scheme.payload(coverage, rank)
    received = slice_factors(coverage, made, rank) | dict(sent)
    generator = torch.Generator().manual_seed(rank)
    trained = received if scheme.fresh else sent
    delta = {key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in trained.items()}
    return Change(delta, received, 3, rank)
