"""The broadcast: written by the server, opened by a client, and its reply. Both ends of the protocol are here.

All clients of one coverage and rank get the same: the adapter's slice, what changes their base, the seed of the factors
that they make themselves, and the training settings. A fresh adapter is each client's own: both ends make it from that
seed and the client's name. A client answers with the change of each trained factor, and keeps
what the codec or the saliency mask lost of it for its next answer (error feedback: Karimireddy et al., arXiv
1901.09847).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from pydantic import ValidationError

from legolm.adapter import (
    Change,
    Flat,
    Layout,
    Tensors,
    adapter_keys,
    adapter_layout,
    check_finite,
    concatenated,
    initial_factors,
    is_frozen,
    load_frozen,
    parse_key,
    slice_factors,
    tensors_hash,
    under_prefix,
    whitened_layout,
    with_prefix,
)
from legolm.block import Block, Coverage
from legolm.config import Codec
from legolm.errors import LegolmError, PublicError
from legolm.federate.wire import codec
from legolm.federate.wire.messages import (
    MAX_REPLY_HEADER,
    REPLIED,
    Envelope,
    TrainRequest,
    TrainSettings,
    UpdateReply,
    pack,
    unpack,
)
from legolm.privacy import NOISE
from legolm.runs import Training
from legolm.system import derive_seed

HOLDERS = "holders"
"""Tensor of a broadcast (uint8): how many of the round's clients, up to 255, hold each entry that trains."""
MAX_CHANGE = 1e4
"""Of one entry of a factor in one training, absolute: young adapters move by 1e-3 to 1."""


@dataclass(frozen=True)
class Broadcast:
    """Settings and tensors for all clients of one coverage and rank; `hash` is of the tensors.

    `start` is what all train from after the codec, with the factors that they make alike; it is empty where each makes
    its own. `sent` is the same before a codec that loses something. `trained` is the layout of those that change.
    """

    settings: TrainSettings
    coverage: Coverage
    rank: int
    content: Tensors
    start: Tensors
    sent: Tensors
    trained: Layout
    hash: str

    def received(self, client: str) -> Tensors:
        """What this client trains from. Its own adapter is made when asked, and not kept: clients are many."""
        return self.start or _made(self.settings, self.coverage, self.rank, client)


@dataclass(frozen=True)
class Opened:
    """What a client makes of a broadcast: what it trains from, without those in `frozen`, and what its base gets.

    `holders` are how many hold each entry, where the client needs it.
    """

    start: Tensors
    frozen: set[str]
    fold: Tensors
    holders: Tensors


@dataclass(frozen=True)
class Update:
    """A checked reply: who sent it, what it learned, what it says of its training."""

    envelope: Envelope
    change: Change
    training: Training


def write(
    settings: TrainSettings,
    coverage: Coverage,
    rank: int,
    payload: Tensors,
    fold: Tensors,
    holders: Tensors | None = None,
    side: Tensors | None = None,
) -> Broadcast:
    """The broadcast of a scheme's `payload` and `fold` for this coverage and rank.

    `holders`, in the block's slice, are for clients that add noise themselves; `side` are the frozen factors that
    clients have with their block.
    """
    fold_rank = max((t.shape[0] for key, t in fold.items() if key.endswith(".A")), default=0)
    if settings.fold_seeds:
        fold = {key: tensor for key, tensor in fold.items() if not is_frozen(key, coverage.shape)}
        if not any(bool(tensor.any()) for tensor in payload.values()):
            payload = {}  # a period begins with what the client makes
    sent = bool(payload) or settings.derived_seed is None
    settings = settings.model_copy(update={"sent": sent, "fold_rank": fold_rank})
    plain = codec.encode(payload, settings.codec)
    content = plain | with_prefix("fold", codec.encode(fold, settings.codec))
    start: Tensors = {}
    held: Tensors = {}
    if not settings.fresh:
        made = _made(settings, coverage, rank) | (side or {})
        layout = _sent(settings, coverage, rank) if sent else Layout({})
        start = made | dict(_decoded(plain, settings, layout))
        held = made | payload if settings.codec != "none" else {}
    trained = _sent(settings, coverage, rank, settings.layers)
    if holders:
        counts = torch.cat([holders[key].flatten() for key in trained.shapes])
        content |= {HOLDERS: counts.clamp(max=255).to(torch.uint8)}
    return Broadcast(settings, coverage, rank, content, start, held, trained, tensors_hash(content))


def passed_on(request: TrainRequest, coverage: Coverage, content: Tensors, side: Tensors) -> Broadcast:
    """A broadcast that came, for who asks others the same and accepts what they answer.

    Raises `LegolmError` as `open_`, and for one of which each client makes its own.
    """
    settings = request.settings
    if settings.fresh or settings.fold_rank or settings.fold_seeds:
        raise PublicError("a relay adds up changes of the same factors, and these are each client's own, or fold")
    start, trained = (
        open_(request, coverage, content, side).start,
        _sent(settings, coverage, request.rank, settings.layers),
    )
    return Broadcast(settings, coverage, request.rank, content, start, {}, trained, tensors_hash(content))


def open_(request: TrainRequest, coverage: Coverage, content: Tensors, side: Tensors | None = None) -> Opened:
    """What training starts from, in this block's slice, beside the frozen `side` that came with the block.

    Raises `LegolmError` for tensors that do not fit it.
    """
    settings = request.settings
    trained = _sent(settings, coverage, request.rank, settings.layers)
    sent = _sent(settings, coverage, request.rank) if settings.sent else Layout({})
    plain = {name: tensor for name, tensor in content.items() if name != HOLDERS and not name.startswith("fold.")}
    start = _made(settings, coverage, request.rank, request.client) | (side or {})
    start |= dict(_decoded(plain, settings, sent))
    fold = _fold(settings, coverage, under_prefix("fold", content))
    # In a secure sum a client knows by itself who holds what.
    held = {} if request.secure is not None else _holders(settings, content, trained)
    return Opened(start, set(start) - set(trained.shapes), fold, held)


def side_of(request: TrainRequest, block: Block) -> Tensors:
    """The frozen factors that came with the block; none where the client makes all. Raises `LegolmError`."""
    settings = request.settings
    if not settings.whitened:
        return {}
    return load_frozen(block.path, whitened_layout(block.coverage, settings.targets, request.rank, settings.ranks))


def answer(
    request: TrainRequest,
    content: Tensors,
    delta: Tensors,
    examples: int,
    metrics: dict[str, float],
    lost: Tensors,
    keep: Callable[[Tensors], str] = lambda left: "",
) -> tuple[bytes, Tensors]:
    """The reply with this change, and what of it does not arrive; `lost` is what the last one lost.

    `keep` keeps that for the client's next round, and gives the hash of what it wrote.

    Without `error_feedback` nothing is kept or added: the factors of another round may be others.
    """
    settings = request.settings
    if settings.error_feedback and lost:
        delta = {key: tensor + lost[key] for key, tensor in delta.items()}
    encoded = codec.encode(delta, settings.codec, settings.keep)
    left: Tensors = {}
    if settings.error_feedback and (settings.codec != "none" or settings.keep < 1):
        arrived = codec.decode(encoded, settings.codec, Layout.of(delta), settings.keep)
        left = {key: tensor - arrived[key] for key, tensor in delta.items()}
    reply = UpdateReply(
        **{field: getattr(request, field) for field in REPLIED},
        received_hash=tensors_hash(content),
        examples=examples,
        metrics=metrics,
        state=keep(left),
    )
    return pack(reply, encoded), left


def accept(content: bytes, request: TrainRequest, broadcast: Broadcast) -> Update:
    """Check a reply against what was asked and what was sent: the gate in front of the aggregation.

    An update is refused before a byte of it is added. Raises `LegolmError` with the first mismatch of header, keys,
    shape, dtype or finiteness.
    """
    reply, tensors = unpack(content, UpdateReply, MAX_REPLY_HEADER)
    expected: dict[str, object] = {field: getattr(request, field) for field in REPLIED}
    expected["received_hash"] = broadcast.hash
    for name, value in expected.items():
        if getattr(reply, name) != value:
            raise LegolmError(f"{name} is {getattr(reply, name)!r}; asked for {value!r}")
    delta = codec.decode(tensors, request.settings.codec, broadcast.trained, request.settings.keep)
    try:
        check_finite(delta)
        _check_size(delta)
    except LegolmError as error:
        rate = request.settings.train.learning_rate
        raise LegolmError(f"{error}; if training diverged, lower train.learning_rate, {rate:g}") from None
    try:
        training = Training.model_validate(reply.metrics | {"state": reply.state or None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise LegolmError(f"metrics.{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from None
    _check_noise(request.settings, reply.examples, training)
    received = broadcast.received(request.client)
    return Update(reply, Change(delta, received, reply.examples, reply.rank, broadcast.sent), training)


def _check_noise(settings: TrainSettings, examples: int, training: Training) -> None:
    """Raise `LegolmError` for a training under DP-SGD that does not say what it cost, or cannot have cost so little."""
    dp = settings.dp
    if dp is None or dp.level != "example":
        return
    noise, rate = training.noise_multiplier, training.sampling_rate
    if noise is None or rate is None:
        raise LegolmError("metrics: no sampling_rate and noise_multiplier, by which privacy.dp is accounted")
    least, most = (dp.noise_multiplier,) * 2 if dp.noise_multiplier is not None else NOISE
    if not least * (1 - 1e-9) <= noise <= most * (1 + 1e-9):
        raise LegolmError(
            f"metrics.noise_multiplier is {noise:g}; asked for {least:g}" + f" to {most:g}" * (least < most)
        )
    whole = min(1.0, settings.train.batch_size / examples)
    if rate < whole * (1 - 1e-9):
        raise LegolmError(f"metrics.sampling_rate is {rate:g}; a batch of {examples} examples is {whole:g} of them")


def arrived(factors: Tensors, name: Codec) -> Tensors:
    """Factors as they arrive after this codec."""
    return dict(codec.decode(codec.encode(factors, name), name, Layout.of(factors)))


def _made(settings: TrainSettings, coverage: Coverage, rank: int, client: str = "") -> Tensors:
    """The factors that a client makes itself, in its block's slice; fresh ones are its own."""
    seed = settings.derived_seed
    if seed is None:
        return {}
    factors = initial_factors(
        coverage.shape,
        settings.targets,
        settings.run_rank,
        derive_seed(seed, client) if settings.fresh else seed,
        settings.frozen_side,
        settings.ranks,
    )
    return slice_factors(coverage, factors, rank)


def _fold(settings: TrainSettings, coverage: Coverage, content: Tensors) -> Tensors:
    """What the base gets: as it was sent, or beside the frozen sides of its periods."""
    seeds, targets = settings.fold_seeds, settings.targets
    if not seeds:
        keys = adapter_keys(coverage, targets) if settings.fold_rank else []
        return dict(_decoded(content, settings, adapter_layout(coverage, keys, settings.fold_rank)))
    ranks = {module: len(seeds) * rank for module, rank in settings.ranks.items()}
    keys = adapter_keys(coverage, targets, trained=True)
    trained = _decoded(content, settings, adapter_layout(coverage, keys, len(seeds) * settings.run_rank, ranks))
    made: Tensors = {}
    for seed in seeds:
        one = initial_factors(coverage.shape, targets, settings.run_rank, seed, True, settings.ranks)
        made = concatenated(made, {key: one[key] for key in one if is_frozen(key, coverage.shape)})
    return slice_factors(coverage, made, len(seeds) * settings.run_rank) | dict(trained)


def _holders(settings: TrainSettings, content: Tensors, trained: Layout) -> Tensors:
    if settings.dp is None or settings.dp.noise != "distributed":
        return {}
    found = content.get(HOLDERS)
    if found is None or found.dtype != torch.uint8 or found.shape != (trained.total,) or not bool(found.all()):
        raise PublicError(f"{HOLDERS}: must be {trained.total} counts of at least one")
    return dict(Flat(found, trained))


def _check_size(delta: Flat) -> None:
    """Raise `LegolmError` for an entry that no training makes, and whose sums and products overflow."""
    most = float(delta.flat.abs().max()) if len(delta.flat) else 0.0
    if most > MAX_CHANGE:
        key = next(key for key, tensor in delta.items() if float(tensor.abs().max()) == most)
        raise LegolmError(f"{key} has a change of {most:.3g}; at most {MAX_CHANGE:g} is taken")


def _sent(settings: TrainSettings, coverage: Coverage, rank: int, layers: Collection[int] | None = None) -> Layout:
    """Where the factors that are sent are; those of `layers`, if given, are what trains and comes back."""
    keys = adapter_keys(coverage, settings.targets, trained=settings.frozen_side)
    if layers is not None:
        keys = [key for key in keys if parse_key(key)[0] in layers]
    return adapter_layout(coverage, keys, rank, settings.ranks)


def _decoded(content: Tensors, settings: TrainSettings, layout: Layout) -> Flat:
    found = codec.decode(content, settings.codec, layout)
    check_finite(found)
    return found
