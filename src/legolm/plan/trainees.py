"""What clients would train of the blocks, and what of a block a client may train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from legolm.aggregate import make_scheme
from legolm.block import Base, Coverage, decoder_weights
from legolm.config import ClientConfig, RunConfig
from legolm.errors import LegolmError
from legolm.models import layout_of
from legolm.plan.disk import product_bytes
from legolm.plan.needs import Trainee


class Trainees:
    """What each client would train of each block; what is alike is made once."""

    def __init__(
        self, config: RunConfig, base: Base, coverages: Mapping[str, Coverage], masked: Collection[str]
    ) -> None:
        self._config, self._base, self._coverages, self._masked = config, base, coverages, masked
        self._made: dict[tuple[str, tuple[int, ...], int], Trainee] = {}
        scheme, lora = make_scheme(config.aggregate), config.lora
        ranks = [one.rank or lora.rank for one in config.clients]
        rounds = config.federation.rounds if config.federation.mode == "federated" and scheme.folds else 0
        self._folded = product_bytes(config, base.shape, scheme.held_rank(ranks, lora.rank, rounds)) if rounds else 0

    def __call__(self, client: ClientConfig, block: str) -> Trainee:
        """The client's part of a block."""
        trains = check_layers(client, self._config, self._coverages[block]) if client.layers else self._coverages[block]
        return self._once(block, trains, client.rank or self._config.lora.rank)

    def of(self, block: str) -> Trainee:
        """A block by itself, all of it trained."""
        return self._once(block, self._coverages[block], self._config.lora.rank)

    def _once(self, block: str, trains: Coverage, rank: int) -> Trainee:
        key = block, trains.layers, rank
        if key not in self._made:
            self._made[key] = self._of(self._coverages[block], trains, rank, block in self._masked)
        return self._made[key]

    @property
    def whole(self) -> Trainee:
        """The LLM."""
        full = Coverage.full(self._base.shape)
        return self._of(full, full, self._config.lora.rank, False)

    def _of(self, coverage: Coverage, trains: Coverage, rank: int, masked: bool) -> Trainee:
        base, decoder = self._base, decoder_weights(self._base.shape)
        made = Trainee(
            coverage,
            trains,
            others=base.parameters - decoder,
            vocabulary=base.config.vocab_size,
            width=base.dtype.itemsize,
            targets=self._config.lora.targets,
            rank=rank,
            masked=masked,
            layout=layout_of(base.config),
        )
        return replace(made, folded=self._folded * made.linears // decoder)


def check_layers(client: ClientConfig, config: RunConfig, coverage: Coverage) -> Coverage:
    """What of its block's coverage the client trains. Raises `LegolmError` for layers that it will not have."""
    if client.layers is None:
        return coverage
    method = next(block.method for block in config.blocks if block.name == client.block)
    if method == "structured" and len(coverage.layers) < coverage.shape.layers:
        raise LegolmError(
            f"clients: {client.id!r}: layers: which its block {client.block!r} keeps is chosen when it is cut; name "
            "those, too (method window, with `layers`)"
        )
    try:
        return coverage.within(client.layers)
    except LegolmError as error:
        raise LegolmError(f"clients: {client.id!r}: layers: {error}") from None
