"""A client's runtime: answers a request from the client's site, and knows of no run, config or other client."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from legolm.adapter import Tensors, adapter_keys, adapter_layout, concatenated, merged, under_prefix, with_prefix
from legolm.block import Block
from legolm.config import CalibrationConfig, DpConfig, Precision, TrainConfig
from legolm.data import Familiar, Seen, TokenRows, Tokens, Turns, check_whole, own_tokens, tokens_of
from legolm.errors import LegolmError, PublicError
from legolm.evaluation import Answers, score_each
from legolm.federate.client.secure import LATER, keys, masked
from legolm.federate.client.site import Site, SiteOf, Split
from legolm.federate.client.state import keep_state, read_state
from legolm.federate.wire import (
    SKETCHES,
    SUMS,
    CalibrateRequest,
    Envelope,
    EvaluateRequest,
    KeysRequest,
    Otherwise,
    ScoreReply,
    SumsReply,
    TrainRequest,
    answer,
    decode,
    kind_of,
    open_,
    pack,
    side_of,
    unpack,
)
from legolm.finetune import Task, train
from legolm.models import choose_device, dtype_of, free_bytes, load_model, load_tokenizer
from legolm.privacy import clipped, deviation, with_share
from legolm.prune import collected, flat, sketched
from legolm.system import Progress, atomic_write, keep_freed_memory, release_memory, trim

BESIDE = 0.125
"""Of a process's part of the free memory, for models that are not at work: reading one anew is a tenth of a round, but
what is free now is for what training takes, which nobody may have taken yet."""
SCORED = 256
"""Sets of rows whose answers stay in memory: a round's global update is scored again as the model for questions that
are not like a client's own."""


class ClientRuntime:
    """Answers for the sites that `site_of` gives: a device's one, or all of a simulation.

    Keeps the model at work in memory, and others for which there is plenty of room. `write` writes a file of theirs
    whole.
    """

    def __init__(self, site_of: SiteOf, write: Callable[[Path, bytes], None] = atomic_write) -> None:
        self._site_of, self._write = site_of, write
        self._held: OrderedDict[tuple[str, ...], tuple[Block, Any]] = OrderedDict()  # the model at work last
        self._tokenizers: dict[Path, Any] = {}
        self._answers: OrderedDict[str, Answers] = OrderedDict()

    def answer(self, content: bytes, until: float | None = None) -> bytes:
        """Reply to a request. Raises `LegolmError` when the request does not fit the client's block.

        Training ends with the step in which `until` (of `time.monotonic`) is over.
        """
        try:
            with keep_freed_memory():
                return self._answer(content, until)
        except LegolmError:
            raise
        except BaseException:
            self._held.clear()  # memory that ran out, a trainer from outside: who knows in what state a model is left
            raise

    def _answer(self, content: bytes, until: float | None) -> bytes:
        kind = kind_of(content)
        if kind == "train":
            return self._train(*unpack(content, TrainRequest), until)
        if kind == "calibrate":
            return self._calibrate(unpack(content, CalibrateRequest)[0])
        if kind == "keys":
            return self._keys(unpack(content, KeysRequest)[0])
        if kind in LATER:
            request, phase = LATER[kind]
            header = unpack(content, request)[0]
            site = self._site_of(header.client, header.block)
            return phase(content, site.keeping(), site.block().coverage)
        return self._evaluate(*unpack(content, EvaluateRequest))

    def _train(self, request: TrainRequest, content: Tensors, until: float | None) -> bytes:
        site, settings = self._site_of(request.client, request.block), request.settings
        block, whole = self._load(site, request, settings.precision)
        plain = {name: tensor for name, tensor in content.items() if not name.startswith("secure.")}
        opened = open_(request, block.coverage, plain, side_of(request, block))
        state = read_state(site.state(), request)
        fold = concatenated(under_prefix("fold", state), opened.fold)
        # Of a side that is not trained beside any more what was lost fits nothing.
        lost = {} if settings.fold_seeds else under_prefix("residual", state)
        config = settings.train
        refuse = config.long_examples == "refuse"
        examples = self._examples(request.client, site, "train", config.max_length, refuse, config.turns)
        with merged(whole, block.coverage, fold, request.scale) as model:
            task = Task(
                model=model,
                coverage=block.coverage,
                start=opened.start,
                scale=request.scale,
                examples=examples,
                config=_in_time(config, until),
                precision=settings.precision,
                steps=request.steps,
                seed=request.seed,
                done=request.done,
                total=request.total,
                parts=request.parts,
                frozen=opened.frozen,
                proximal=settings.proximal,
                dropout=settings.dropout,
                dp=settings.dp if settings.dp is not None and settings.dp.level == "example" else None,
            )
            delta, metrics = train(task)

        made = metrics.get("steps", 0.0)
        if request.secure is not None and until is not None and made < request.steps and time.monotonic() >= until:
            raise PublicError(
                f"secure sum: time was over after {made:g} of {request.steps} steps, and a sum is of whole trainings; "
                "raise federation.deadline_s"
            )

        def keep(lost: Tensors) -> str:
            return keep_state(
                self._write, site.state(), request, with_prefix("fold", fold) | with_prefix("residual", lost)
            )

        if request.secure is not None:
            return masked(request, content, site.keeping(), block.coverage, opened.start, delta, lost, keep)
        if settings.dp is not None and settings.dp.noise == "distributed":
            delta = _hidden(delta, settings.dp, opened.holders)
        return answer(request, content, delta, len(examples), metrics, lost, keep)[0]

    def _calibrate(self, request: CalibrateRequest) -> bytes:
        site = self._site_of(request.client, request.block)
        block, profile = site.block(), site.profile()
        if (block.method, block.base_fingerprint) != ("dense", request.base_fingerprint):
            raise _another_cut(request)
        torch.set_num_threads(profile.threads)
        settings = CalibrationConfig(samples=request.samples, length=request.length)
        (rows,) = site.examples("train")
        tokens = own_tokens(rows, settings, load_tokenizer(block.path, site.prompts()), request.seed)
        if tokens.numel() < (least := block.coverage.shape.hidden):
            raise PublicError(
                f"its text has {tokens.numel()} tokens in whole samples, fewer than the hidden size, {least}, and "
                "their sums would tell them; it needs more rows, or shorter calibration.length"
            )
        where, quiet = choose_device(profile.device), Progress(Console(quiet=True))
        found = collected(block.path, tokens, request.needs, request.precision, quiet, where)
        if request.sketch is None:
            sums = {SUMS: flat(found)}
        else:
            squares, sketches = sketched(found, request.sketch, request.sketch_seed)
            sums = {SUMS: squares, SKETCHES: sketches}
        return pack(SumsReply(tokens=tokens.numel()), sums)

    def _keys(self, request: KeysRequest) -> bytes:
        site = self._site_of(request.client, request.block)
        block = site.block()
        if not _is_for(request, block):
            raise _another_cut(request)
        return keys(request, site.keeping(), block.coverage, sum(map(len, site.examples("train"))))

    def _evaluate(self, request: EvaluateRequest, content: Tensors) -> bytes:
        block, whole = self._load(self._site_of(request.client, request.block), request, request.precision)
        keys = adapter_keys(block.coverage, request.targets)
        own = {name: tensor for name, tensor in content.items() if not name.startswith("otherwise.")}
        asked = [(own, adapter_layout(block.coverage, keys, request.rank, request.ranks))]
        if (other := request.otherwise) is not None:
            layout = adapter_layout(block.coverage, keys, other.rank, other.ranks)
            others = under_prefix("otherwise", content)
            seen = others.pop("seen", torch.zeros(0))
            asked.append((others, layout))
        parts = [dict(decode(tensors, "none", layout)) for tensors, layout in asked]
        sets = [self._scored(request, client, split) for client, split in request.sets]
        shares: Sequence[Sequence[Sequence[Tokens]]] = [sets]
        if other is not None:
            familiar = self._familiar(request, other, seen)
            shares = list(zip(*map(familiar.parted, sets), strict=True))
        answers = []
        for factors, share in zip(parts, shares, strict=True):
            answers += self._answered(block, whole, factors, share, request)
        each = [Answers.joined(answers[at :: len(sets)]) for at in range(len(sets))]
        return pack(ScoreReply(scores=[one.score for one in each]), {})

    def _answered(
        self,
        block: Block,
        whole: Any,
        factors: Tensors,
        sets: Sequence[Sequence[Tokens]],
        request: EvaluateRequest,
    ) -> list[Answers]:
        """The block's answers with these factors to each set; the same of a set as a whole are not made twice."""
        asked = hashlib.sha256(repr((_asked(request), request.scale, request.precision, request.batch_size)).encode())
        for key, tensor in sorted(factors.items()):
            asked.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            asked.update(tensor.contiguous().view(torch.uint8).numpy().data)
        keys = []
        for rows in sets:
            one = asked.copy()
            for row in rows:
                one.update(repr((row.ids, row.answer)).encode())
            keys.append(one.hexdigest())
        found = {key: self._answers[key] for key in keys if key in self._answers}
        if len(found) < len(set(keys)):
            with merged(whole, block.coverage, factors, request.scale) as model:
                for key, rows in zip(keys, sets, strict=True):
                    if key not in found:
                        found[key] = score_each(model, rows, request.batch_size, request.precision)
        for key in keys:
            self._answers[key] = found[key]
            self._answers.move_to_end(key)
        while len(self._answers) > SCORED:
            self._answers.popitem(last=False)
        return [found[key] for key in keys]

    def _scored(self, request: EvaluateRequest, client: str, split: Split) -> TokenRows:
        site = self._site_of(client, request.block)
        return self._examples(client, site, split, request.max_length, request.long_examples == "refuse")

    def _familiar(self, request: EvaluateRequest, other: Otherwise, seen: torch.Tensor) -> Familiar:
        """What tells the client's own questions, by its training data."""
        try:
            own, public = self._scored(request, request.client, "train"), Seen.unpacked(other.prompts, seen)
            return Familiar.of(own, public, other.away)
        except ValueError as error:
            raise LegolmError(f"client {request.client}: own questions cannot be told from others: {error}") from None

    def _load(self, site: Site, request: TrainRequest | EvaluateRequest, precision: Precision) -> tuple[Block, Any]:
        """The site's block and its model. Raises `LegolmError` when the request was made for another one."""
        key = *_asked(request), precision
        if key not in self._held:
            block, profile = site.block(), site.profile()
            if not _is_for(request, block):
                raise _another_cut(request)
            torch.set_num_threads(profile.threads)
            device = choose_device(profile.device)
            self._make_room(device, profile.threads)  # the old ones first
            model = load_model(block.path, dtype_of(precision)).to(device)
            trim()  # what reading took would stand under all that follows
            self._held[key] = block, model
        self._held.move_to_end(key)
        return self._held[key]

    def _make_room(self, device: torch.device, threads: int) -> None:
        """Of models that are not at work only those stay that take little of this process's part of the memory.

        One goes with its last user; garbage is looked for, a quarter of a second among all that was imported, only
        where something else holds it, as a trainer from outside may.
        """
        room = BESIDE * free_bytes(device) * min(1.0, threads / (os.cpu_count() or 1))
        while sum(_bytes(model) for _, model in self._held.values()) > room:
            gone = weakref.ref(self._held.popitem(last=False)[1][1])
            if gone() is None:
                trim()
            else:
                release_memory()

    def _examples(
        self, client: str, site: Site, split: Split, length: int, refuse: bool, turns: Turns = "last"
    ) -> TokenRows:
        block, model = next(reversed(self._held.values()))
        length, path = min(length, model.config.max_position_embeddings), block.path
        if path not in self._tokenizers:
            self._tokenizers[path] = load_tokenizer(path, site.prompts())
        parts = site.examples(split)
        found = TokenRows.joined([tokens_of(part, self._tokenizers[path], length, turns) for part in parts])
        if refuse:
            check_whole(found, length, split, client)
        return found


def _in_time(config: TrainConfig, until: float | None) -> TrainConfig:
    """The same, over at this time (`time.monotonic`) at the latest."""
    if until is None:
        return config
    left = max(until - time.monotonic(), 1e-3)
    return config.model_copy(update={"seconds": min(left, config.seconds or left)})


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _another_cut(request: Envelope | CalibrateRequest) -> LegolmError:
    return PublicError(f"block {request.block}: the request was made for another cut of it or another base model")


def _is_for(request: Envelope, block: Block) -> bool:
    return _asked(request) == (block.name, block.base_fingerprint, block.coverage.hash)


def _asked(request: Envelope) -> tuple[str, str, str]:
    return request.block, request.base_fingerprint, request.coverage_hash


def _hidden(delta: Tensors, dp: DpConfig, holders: Tensors) -> Tensors:
    """The change, clipped, with this client's part of the noise."""
    return with_share(clipped(delta, dp.clip), deviation(dp), holders, dp.dropouts)
