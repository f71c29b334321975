"""Who takes part, with which block and rank."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from legolm.block import Block, Coverage
from legolm.config import RunConfig
from legolm.system import derive_seed

LLM = "llm"
"""Names the LLM among blocks; and, of a pooled run, the one client, which holds it and everyone's data."""


@dataclass(frozen=True)
class Members:
    """The clients' ids in the config's order; block and rank by client, those of `llm` too.

    `trains` is what of the LLM a client's changes cover: its block's coverage, or of that the layers that it trains.
    `turns` are the blocks of those who train another one in each round; `block` is the first of them.
    """

    clients: tuple[str, ...]
    block: Mapping[str, Block]
    rank: Mapping[str, int]
    trains: Mapping[str, Coverage]
    turns: Mapping[str, Sequence[Block]]

    @staticmethod
    def of(config: RunConfig, blocks: Mapping[str, Block], block_of: Mapping[str, str]) -> Members:
        """`blocks` are the cut blocks and the LLM by name, `block_of` the block's name of each client."""
        rank = {client.id: client.rank or config.lora.rank for client in config.clients}
        block = {id: blocks[name] for id, name in block_of.items()} | {LLM: blocks[LLM]}
        some = {client.id: tuple(client.layers) for client in config.clients if client.layers is not None}
        # Clients are many, and blocks are few.
        alike = {(block[id].name, layers): id for id, layers in some.items()}
        cut = {key: block[id].coverage.within(key[1]) for key, id in alike.items()}
        return Members(
            tuple(client.id for client in config.clients),
            block,
            rank | {LLM: config.lora.rank},
            {id: cut[one.name, some[id]] if id in some else one.coverage for id, one in block.items()},
            {client.id: [blocks[name] for name in client.blocks] for client in config.clients if client.blocks},
        )

    def at(self, number: int) -> Members:
        """The same with the blocks that are trained in this round."""
        now = {id: blocks[(number - 1) % len(blocks)] for id, blocks in self.turns.items()}
        trains = {id: one.coverage for id, one in now.items()}
        return replace(self, block={**self.block, **now}, trains={**self.trains, **trains})

    @property
    def llm(self) -> Block:
        """The LLM as a block."""
        return self.block[LLM]

    def draw(self, config: RunConfig, number: int) -> list[str]:
        """The clients of a round: those there, of whom a share is drawn from the run's seed."""
        if config.federation.mode == "pooled":
            return [LLM]
        return drawn(config, number, self.able(config))

    def able(self, config: RunConfig) -> set[str]:
        """The clients that may take part in rounds."""
        return {id for id in self.clients if not config.federation.capable or is_dense(self.block[id])}


def drawn(config: RunConfig, number: int, able: Collection[str]) -> list[str]:
    """The clients of a round that take part: those there of the ones that are `able`, of whom a share is drawn."""
    federation = config.federation
    there = [client.id for client in config.clients if client.there(number) and client.id in able]
    chosen = set(random.Random(derive_seed(config.seed, "draw", number)).sample(there, federation.drawn(len(there))))
    return [id for id in there if id in chosen]


def is_dense(block: Block) -> bool:
    """Whether the block is the whole LLM."""
    whole = block.coverage.shape.layers * block.coverage.shape.layer_weights
    return not block.sparsity and block.coverage.kept_weights == whole
