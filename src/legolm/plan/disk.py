"""What the stages of a run keep on the disk, beside blocks and final models; and the sums in memory."""

from __future__ import annotations

from collections.abc import Sequence

from legolm.adapter import adapter_parameters, modules_of, whitened_layout
from legolm.aggregate import make_scheme
from legolm.block import Coverage
from legolm.config import RunConfig
from legolm.models import Shape
from legolm.prune import clients_needs, clients_sketch, sent_bytes

MOMENTS = {"none": 0, "fedavgm": 1, "fedadam": 2, "fedyogi": 2}
"""Copies of the factors that a server optimizer keeps."""


def stages_bytes(config: RunConfig, shape: Shape, ranks: Sequence[int]) -> int:
    """Bytes of tensors: the server's state of each round, what clients carry over, their ends outside the rounds.

    `ranks` are those of the clients that take part in a round. Of the kept updates of `federation.keep_updates` the
    plan knows more.
    """
    federation, lora, clients = config.federation, config.lora, len(config.clients)
    adapter = 4 * adapter_parameters(Coverage.full(shape), lora.targets, lora.rank)
    frozen = frozen_bytes(config, Coverage.full(shape))
    alone = frozen + adapter * clients * (config.evaluate.local_only + (mixed_parts(config) if config.own_parts else 0))
    if federation.mode == "alone":
        return adapter + alone
    scheme = make_scheme(config.aggregate)
    if scheme.folds and federation.personal_steps:  # beside what a client ends with
        alone += clients * product_bytes(config, shape, scheme.held_rank(ranks, lora.rank, federation.rounds))
    server = adapter * (1 + federation.rounds * (1 + MOMENTS[config.aggregate.server_optimizer]))
    server += sum(
        product_bytes(config, shape, scheme.held_rank(ranks, lora.rank, number))
        for number in range(1, federation.rounds + 1)
    )
    # A client keeps what it carried into its last accepted round until the next one is accepted: two files.
    carried = 0
    if scheme.folds:  # of the rounds before
        held = [scheme.held_rank(ranks, lora.rank, federation.rounds - ago) for ago in (1, 2)]
        carried += sum(product_bytes(config, shape, rank) for rank in held if rank > 0)
    if federation.error_feedback and scheme.basis_stays and (federation.codec != "none" or scheme.keep(0.5) < 1):
        carried += 2 * adapter
    return server + alone + len(ranks) * carried


def frozen_bytes(config: RunConfig, coverage: Coverage) -> int:
    """Bytes of the frozen factors that are made of text, in a block's folder."""
    if make_scheme(config.aggregate).whitened is None:
        return 0
    return 4 * whitened_layout(coverage, config.lora.targets, config.lora.rank, config.lora.ranks).total


def sums_bytes(config: RunConfig, shape: Shape) -> int:
    """Bytes of what clients sum of their text for the blocks: all of it together, and of each device the reply.

    That is also in Flower's database, and in the database's log. `federation.regmean` keeps those of each block, too,
    and what the LLM is fitted with is twice as large as they are: whole squares.
    """
    needs = clients_needs(config.cuts)
    if needs == "nothing":
        return 0
    replies = 3 * len(config.clients) if config.federation.engine == "deployment" else 0
    reply = sent_bytes(shape, needs, clients_sketch(config.cuts, shape))
    kept = 1 + 2 * config.federation.fitted + (len(config.blocks) if config.federation.regmean else 0)
    return kept * sent_bytes(shape, needs, None) + replies * reply


def sums_memory(config: RunConfig, shape: Shape) -> int:
    """Peak bytes at the server of the sums of all layers, as squares: beside those added up the next client's.

    `federation.regmean` adds up each block's apart. To fit the LLM takes a block's, all, and what is held of all.
    Clients hold a layer's only.
    """
    needs = clients_needs(config.cuts)
    if needs == "nothing":
        return 0
    squares = sent_bytes(shape, needs, None) * (2 if needs == "full" else 1)
    apart = len(config.blocks) if config.federation.regmean else 1
    return squares * max(3 if config.federation.fitted else 0, apart + 1)


def mixed_parts(config: RunConfig) -> int:
    """How many adapters stand one after the other in what a client ends with, at most (`adapter.mixed`)."""
    own, stays = config.own_parts, config.federation.personal == "last" or make_scheme(config.aggregate).frozen_side
    return 1 if stays else 1 + len(own)


def product_bytes(config: RunConfig, shape: Shape, rank: int) -> int:
    """Bytes of factors of this rank of every module, float32; past a dense matrix's size as that and an identity."""
    found = 0
    for module in modules_of(shape, config.lora.targets):
        rows, cols = shape.matrix(module)
        found += (rows + cols) * (rank if rank * (rows + cols) <= rows * cols else min(rows, cols))
    return 4 * shape.layers * found
