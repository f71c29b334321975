"""A client: answers a request from its own block and its own data.

In simulation the run folder holds all blocks and the data sources of all clients; which of them a request may touch
is decided by its header, which names the client.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from legolm import wire
from legolm.config import RunConfig
from legolm.coverage import tensors_hash
from legolm.data import Tokens, load_parts, render
from legolm.evaluate import score
from legolm.finetune import choose_device, choose_precision, dtype_of, fit, merged
from legolm.memory import keep_freed_memory, release_memory
from legolm.models import load_model, load_tokenizer, resolve
from legolm.prune import llm_block, read_block
from legolm.rundir import RunDir
from legolm.types import Block, ClientData, LegolmError, Tensors


@lru_cache(maxsize=1)
def client_runtime(path: Path) -> ClientRuntime:
    """The runtime of this process: models and data are loaded once."""
    return ClientRuntime(RunDir(path))


class ClientRuntime:
    """Loads what requests need and answers them; keeps one model in memory."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._config = run.config()
        self._precision = choose_precision(self._config.precision)
        self._block: Block | None = None
        self._model: Any = None
        self._tokens: dict[tuple[str, str], tuple[Tokens, ...]] = {}
        torch.set_num_threads(self._config.federation.threads)

    def answer(self, content: bytes) -> bytes:
        """Reply to a request. Raises `LegolmError` when the request does not fit this client's block."""
        with keep_freed_memory():
            if wire.kind_of(content) == "train":
                return self._train(*wire.unpack(content, wire.TrainRequest))
            return self._evaluate(*wire.unpack(content, wire.EvaluateRequest))

    def _train(self, request: wire.TrainRequest, start: Tensors) -> bytes:
        block = self._checked(request, start)
        examples = self._examples(request.client, "train")
        delta, metrics = fit(
            self._model,
            block.coverage,
            start,
            request.scale,
            examples,
            self._config.train,
            self._precision,
            request.steps,
            request.seed,
            request.done,
            request.total,
            dropout=self._config.lora.dropout,
        )
        reply = wire.UpdateReply(
            **request.model_dump(exclude={"kind", "phase", "steps", "done", "total", "seed"}),
            received_hash=tensors_hash(start),
            examples=len(examples),
            metrics=metrics,
        )
        return wire.pack(reply, delta)

    def _evaluate(self, request: wire.EvaluateRequest, factors: Tensors) -> bytes:
        block = self._checked(request, factors)
        scores = []
        with merged(self._model, block.coverage, factors, request.scale) as model:
            for client, split in request.sets:
                examples = self._examples(client, split)
                size = self._config.evaluate.batch_size
                scores.append(score(model, examples, self._tokenizer.pad_token_id, size, self._precision))
        return wire.pack(wire.ScoreReply(scores=scores), {})

    def _checked(self, request: wire.TrainRequest | wire.EvaluateRequest, factors: Tensors) -> Block:
        block = self._load(request.block, request.base_fingerprint)
        if (block.base_fingerprint, block.coverage.hash) != (request.base_fingerprint, request.coverage_hash):
            raise LegolmError(
                f"block {request.block}: the request was made for another cut of it or another base model"
            )
        wire.check_factors(factors, factors, block.coverage, request.rank)
        return block

    def _load(self, name: str, fingerprint: str) -> Block:
        if self._block is None or self._block.name != name:
            self._model = None  # free the old one first
            release_memory()
            if name == "llm":
                self._block = llm_block(resolve(self._config.model), fingerprint)
            else:
                self._block = read_block(self._run.block(name))
            self._model = load_model(self._block.path, dtype_of(self._precision)).to(choose_device(self._config.device))
        return self._block

    def _examples(self, client: str, split: Literal["train", "validation", "test"]) -> tuple[Tokens, ...]:
        if (client, split) not in self._tokens:
            length = min(self._config.train.max_length, self._model.config.max_position_embeddings)
            rows = getattr(self._data[client], split)
            tokens = tuple(render(row, self._tokenizer, length) for row in rows)
            refused = [place for place, one in enumerate(tokens) if one.truncated]
            if refused and self._config.train.long_examples == "refuse":
                raise LegolmError(
                    f"data: {split} example {refused[0]} of {client!r} is longer than {length} tokens; raise "
                    "train.max_length as far as the model's context allows, or set train.long_examples=truncate"
                )
            self._tokens[client, split] = tokens
        return self._tokens[client, split]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(resolve(self._config.model))

    @cached_property
    def _data(self) -> dict[str, ClientData]:
        return client_data(self._config)


def client_data(config: RunConfig) -> dict[str, ClientData]:
    """Every client's data, by client id."""
    parts = {client.id: client.data or client.id for client in config.clients}
    loaded = load_parts(config.data, list(dict.fromkeys(parts.values())), config.seed)
    return {client: loaded[part] for client, part in parts.items()}
