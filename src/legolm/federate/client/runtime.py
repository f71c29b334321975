"""A client: answers a request from its own block and its own data.

In simulation the run folder holds all blocks and the data sources of all clients; which of them a request may touch
is decided by its header, which names the client.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from legolm.adapter import (
    Flat,
    Layout,
    Tensors,
    adapter_keys,
    adapter_layout,
    check_finite,
    concatenated,
    initial_factors,
    merged,
    slice_factors,
    tensors_hash,
    under_prefix,
    with_prefix,
)
from legolm.block import Block, Coverage, llm_block, read_block
from legolm.data import ClientData, Tokens, check_whole, client_data, render
from legolm.errors import LegolmError
from legolm.evaluate import score
from legolm.federate.wire import codec
from legolm.federate.wire import messages as wire
from legolm.finetune import fit
from legolm.models import choose_device, choose_precision, dtype_of, load_model, load_tokenizer, resolve
from legolm.runs import RunDir
from legolm.system import atomic_write, keep_freed_memory, release_memory, trim


@lru_cache(maxsize=1)
def client_runtime(path: Path) -> ClientRuntime:
    """The runtime of this process: models and data are loaded once."""
    return ClientRuntime(RunDir(path))


class ClientRuntime:
    """Loads what requests need and answers them; keeps one model in memory."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._config = run.config()
        self._precision = choose_precision(self._config.precision, self._config.device)
        self._block: Block | None = None
        self._model: Any = None
        self._made: tuple[tuple[int, bool], Tensors] | None = None
        self._tokens: dict[tuple[str, str], tuple[Tokens, ...]] = {}
        torch.set_num_threads(self._config.federation.threads)

    def answer(self, content: bytes) -> bytes:
        """Reply to a request. Raises `LegolmError` when the request does not fit this client's block."""
        with keep_freed_memory():
            if wire.kind_of(content) == "train":
                return self._train(*wire.unpack(content, wire.TrainRequest))
            return self._evaluate(*wire.unpack(content, wire.EvaluateRequest))

    def _train(self, request: wire.TrainRequest, content: Tensors) -> bytes:
        block = self._checked(request)
        coverage, targets = block.coverage, self._config.lora.targets
        keys = adapter_keys(coverage, targets, trained=request.frozen)
        derived = self._derived(request, coverage) if request.derived_seed is not None else {}
        # Frozen side: the factors that do not train. FLoRA: all of them, trained anew in each round.
        sent = keys if request.frozen or not derived else []
        received = {name: tensor for name, tensor in content.items() if not name.startswith("fold.")}
        start = derived | dict(
            self._decoded(received, request, adapter_layout(coverage, sent, request.rank, self._config.lora.ranks))
        )
        frozen = set(start) - set(keys)
        state = self._state(request)
        everything = adapter_keys(coverage, targets) if request.fold_rank else []
        folded = adapter_layout(coverage, everything, request.fold_rank)
        new = dict(self._decoded(under_prefix("fold", content), request, folded))
        fold = concatenated(under_prefix("fold", state), new)
        examples = self._examples(request.client, "train")
        with merged(self._model, block.coverage, fold, request.scale) as model:
            delta, metrics = fit(
                model,
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
                frozen=frozen,
                proximal=request.proximal,
                dropout=self._config.lora.dropout,
            )
        residual = under_prefix("residual", state)
        delta = {key: tensor + residual[key] if residual else tensor for key, tensor in delta.items()}
        encoded = codec.encode(delta, request.codec, request.keep)
        lost: Tensors = {}
        if request.error_feedback and request.codec != "none":
            arrived = codec.decode(encoded, request.codec, Layout.of(delta), request.keep)
            lost = {
                key: (tensor - arrived[key]) * codec.most_salient(tensor, request.keep) for key, tensor in delta.items()
            }
        self._keep_state(request, with_prefix("fold", fold) | with_prefix("residual", lost))
        reply = wire.UpdateReply(
            **{field: getattr(request, field) for field in wire.REPLIED},
            received_hash=tensors_hash(content),
            examples=len(examples),
            metrics=metrics,
        )
        return wire.pack(reply, encoded)

    def _evaluate(self, request: wire.EvaluateRequest, content: Tensors) -> bytes:
        block = self._checked(request)
        keys = adapter_keys(block.coverage, self._config.lora.targets)
        layout = adapter_layout(block.coverage, keys, request.rank, self._config.lora.ranks)
        factors = dict(codec.decode(content, "none", layout))
        scores = []
        with merged(self._model, block.coverage, factors, request.scale) as model:
            for client, split in request.sets:
                examples = self._examples(client, split)
                size = self._config.evaluate.batch_size
                scores.append(score(model, examples, size, self._precision))
        return wire.pack(wire.ScoreReply(scores=scores), {})

    def _checked(self, request: wire.TrainRequest | wire.EvaluateRequest) -> Block:
        block = self._load(request.block, request.base_fingerprint)
        if (block.base_fingerprint, block.coverage.hash) != (request.base_fingerprint, request.coverage_hash):
            raise LegolmError(
                f"block {request.block}: the request was made for another cut of it or another base model"
            )
        return block

    def _decoded(self, content: Tensors, request: wire.TrainRequest, layout: Layout) -> Flat:
        found = codec.decode(content, request.codec, layout)
        check_finite(found)
        return found

    def _derived(self, request: wire.TrainRequest, coverage: Coverage) -> Tensors:
        """The slice of the factors that everyone makes from the same seed."""
        lora = self._config.lora
        assert request.derived_seed is not None
        key = (request.derived_seed, request.frozen)
        if self._made is None or self._made[0] != key:
            made = initial_factors(
                coverage.shape, lora.targets, lora.rank, request.derived_seed, request.frozen, lora.ranks
            )
            self._made = key, made
        return slice_factors(coverage, self._made[1], request.rank)

    def _state(self, request: wire.TrainRequest) -> Tensors:
        """What this client kept after the last round in which its update was added."""
        path = self._run.client_state(request.client, request.accepted)
        if request.phase != "round" or not request.accepted or not path.exists():
            return {}
        state: Tensors = load_file(path)
        return state

    def _keep_state(self, request: wire.TrainRequest, state: Tensors) -> None:
        """Write this round's state; older ones than the round that stands are not needed any more."""
        if request.phase != "round" or not state:
            return
        path = self._run.client_state(request.client, request.round)
        atomic_write(path, save({key: tensor.contiguous() for key, tensor in state.items()}))
        for old in path.parent.glob("*.safetensors"):
            if int(old.stem) < request.accepted:
                old.unlink()

    def _load(self, name: str, fingerprint: str) -> Block:
        if self._block is None or self._block.name != name:
            self._model = None  # free the old one first
            release_memory()
            if name == "llm":
                self._block = llm_block(resolve(self._config.model), fingerprint)
            else:
                self._block = read_block(self._run.block(name))
            self._model = load_model(self._block.path, dtype_of(self._precision)).to(choose_device(self._config.device))
            trim()  # what reading took would stand under all that follows
        return self._block

    def _examples(self, client: str, split: Literal["train", "validation", "test"]) -> tuple[Tokens, ...]:
        if client == wire.EVERYONE:
            return tuple(example for id in self._data for example in self._examples(id, split))
        if (client, split) not in self._tokens:
            length = min(self._config.train.max_length, self._model.config.max_position_embeddings)
            rows = getattr(self._data[client], split)
            tokens = tuple(render(row, self._tokenizer, length) for row in rows)
            if self._config.train.long_examples == "refuse":
                check_whole(tokens, length, split, client)
            self._tokens[client, split] = tokens
        return self._tokens[client, split]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(resolve(self._config.model))

    @cached_property
    def _data(self) -> dict[str, ClientData]:
        return client_data(self._config)
