"""What a relay answers: its region's devices are asked the same, and what they say is added up.

A scheme that sums takes N = Σ n_k Δ_k and D = Σ n_k c_k over the clients k, entry by entry. Devices with one block and
rank have one coverage c, so what a region adds to both sums is that of one client with n = Σ n_k and
Δ = Σ n_k Δ_k / n: the result is that of the same devices asked by the server itself, to rounding. Where the way up
loses something (codec), it loses once more at the relay, which keeps that for its next change as a device does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from legolm.adapter import Tensors
from legolm.block import Block, read_block
from legolm.errors import LegolmError, PublicError, brief
from legolm.federate.client import Answering, Piece, UnreachableError, find_block, keep_state, read_state
from legolm.federate.server import checked_scores
from legolm.federate.transport import Exchange, Request
from legolm.federate.wire import (
    MAX_EXAMPLES,
    MAX_METRIC,
    EvaluateRequest,
    ScoreReply,
    TrainRequest,
    Update,
    Welcome,
    accept,
    answer,
    kind_of,
    pack,
    passed_on,
    side_of,
    unpack,
)
from legolm.runs import Score, Training
from legolm.system import atomic_write, derive_seed, read_bounded

IN_TIME = 0.8
"""Of the time that is left for a reply: what the region has; the rest is for adding up and for the ways."""
MEMBERS = "members.json"


class _Members(BaseModel):
    """`last` is the round of each device's last change that counted; `made` whose changes the rounds since are of.

    Whether those counted the server says with its next request.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    last: dict[str, int] = {}
    made: dict[int, list[str]] = {}

    def stood(self, accepted: int) -> _Members:
        """With the last round whose change of the relay's the server added."""
        counted = {id: accepted for id in self.made.get(accepted, [])}
        left = {number: ids for number, ids in self.made.items() if number > accepted}
        return _Members(last=self.last | counted, made=left)


class Relay(Answering):
    """In the folder `home`. `devices` are the names of its region's, asked by `exchange`, beside what `told` gives.

    `give` is called with the block's name, its id and its folder before a device may want it.
    """

    def __init__(
        self,
        home: Path,
        name: str | None,
        piece: Piece,
        devices: Callable[[], Collection[str]],
        exchange: Exchange,
        give: Callable[[str, str, Path], None],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(home, name, note)
        self._piece, self._devices, self._exchange, self._give = piece, devices, exchange, give
        self._welcome: Welcome | None = None
        self.round = 0
        """The last one that the server asked for."""

    def told(self, request: Request) -> str:
        """What a device, or a relay of the region's own, is told beside a request: what this one was, and its name."""
        assert self._welcome is not None
        data = self._welcome.data.model_copy(update={"part": request.client})
        return self._welcome.model_copy(update={"client": request.client, "data": data}).model_dump_json()

    def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
        if not told.relay:
            raise PublicError(
                f"client {told.client}: is a relay, and the server takes it for one device; set clients[].relay to true"
            )
        if told != self._welcome:
            self._place, self._welcome = find_block(told, self._home, (), self._piece, self._note), told
        block = read_block(self._place)
        self._give(told.block, told.block_id, self._place)
        if not (devices := sorted(self._devices())):
            raise UnreachableError("its region has no devices yet; on the relay: legolm devices add")
        kind = kind_of(request)
        if kind == "train":
            return self._train(*unpack(request, TrainRequest), told, block, devices, until)
        if kind == "evaluate":
            return self._evaluate(*unpack(request, EvaluateRequest), devices)
        raise PublicError(f"a relay adds up changes and scores; it has no answer to {kind!r}")

    def _train(
        self,
        request: TrainRequest,
        content: Tensors,
        told: Welcome,
        block: Block,
        devices: Sequence[str],
        until: float | None,
    ) -> bytes:
        if request.secure is not None or request.phase != "round" or request.settings.dp is not None:
            raise PublicError("a relay answers for rounds, without privacy.secure and privacy.dp")
        self.round = request.round
        folder = self._folder(told.run)
        members = _read(folder).stood(request.accepted)
        asked = {id: _for(id, request, members) for id in devices}
        broadcast = passed_on(request, block.coverage, content, side_of(request, block))

        def requests() -> Iterator[Request]:
            for id, own in asked.items():
                yield Request(id, pack(own, content))

        left = None if until is None else IN_TIME * max(until - time.monotonic(), 0.0)
        added = _Sum(len(devices))
        for reply in self._exchange(requests(), left):
            id = devices[reply.index]
            try:
                if reply.error:
                    raise LegolmError(reply.error)
                added.add(id, accept(reply.content, asked[id], broadcast))
            except LegolmError as error:
                self._note(f"round {request.round}: {id}: {brief(error)}")
        if not added.who:
            raise UnreachableError(f"none of its {len(devices)} devices answered")
        self._note(f"round {request.round}: the sum of {len(added.who)} of {len(devices)} devices")
        found = _Members(last=members.last, made=members.made | {request.round: sorted(added.who)})
        self._with_room(lambda: atomic_write(folder / MEMBERS, found.model_dump_json()))
        lost = read_state(folder / "state", request)

        def keep(left: Tensors) -> str:
            def write(path: Path, content: bytes) -> None:
                self._with_room(lambda: atomic_write(path, content))

            return keep_state(write, folder / "state", request, left)

        return answer(request, content, added.mean(), added.examples, added.metrics(), lost, keep)[0]

    def _evaluate(self, request: EvaluateRequest, content: Tensors, devices: Sequence[str]) -> bytes:
        """Each device on its own data; a set's score is that of all their examples together."""

        def sets(id: str) -> list[tuple[str, Literal["validation", "test"]]]:
            if any(client != request.client for client, _ in request.sets):
                raise PublicError("a relay's devices score their own data only")
            return [(id, split) for _, split in request.sets]

        def requests() -> Iterator[Request]:
            for id in devices:
                yield Request(id, pack(request.model_copy(update={"client": id, "sets": sets(id)}), content))

        scores: list[Sequence[Score]] = []
        for reply in self._exchange(requests()):
            id = devices[reply.index]
            try:
                if reply.error:
                    raise LegolmError(reply.error)
                scores.append(checked_scores(reply.content, sets(id), len(devices)))
            except LegolmError as error:
                self._note(f"evaluate: {id}: {brief(error)}")
        if not scores:
            raise UnreachableError(f"none of its {len(devices)} devices answered")
        return pack(ScoreReply(scores=[_together(one) for one in zip(*scores, strict=True)]), {})


class _Sum:
    """Σ n_k Δ_k and Σ n_k, and what the devices say of their training, of so many `devices` at most.

    Each may say its part of what one reply may, whoever else answers: so what all say together is a reply.
    """

    def __init__(self, devices: int) -> None:
        self._examples, self._metric = MAX_EXAMPLES // devices, MAX_METRIC / devices
        self.who: dict[str, Training] = {}
        self.examples = 0
        self._counts: list[int] = []
        self._total: Tensors = {}

    def add(self, id: str, update: Update) -> None:
        """In float64: the order of arrival changes nothing that float32 would show.

        Raises `LegolmError` for a device that says more than its part, and adds nothing of it.
        """
        count, said = int(update.change.examples), update.training
        if count > self._examples:
            raise LegolmError(f"says it has {count:,} examples; a device of this region may have {self._examples:,}")
        for name in ("loss_first", "loss_last", "tokens", "truncated"):
            if abs(getattr(said, name)) > self._metric:
                raise LegolmError(f"metrics.{name} is {getattr(said, name):g}; at most {self._metric:g} is taken")
        for key, tensor in update.change.delta.items():
            held = self._total.setdefault(key, torch.zeros(tensor.shape, dtype=torch.float64))
            held.add_(tensor, alpha=count)
        self.examples += count
        self._counts.append(count)
        self.who[id] = said

    def mean(self) -> Tensors:
        """Σ n_k Δ_k / Σ n_k, float32."""
        return {key: (tensor / self.examples).float() for key, tensor in self._total.items()}

    def metrics(self) -> dict[str, float]:
        """Losses weighted by examples, amounts of all, seconds and steps of the longest."""
        said = list(self.who.values())
        weights = [count / self.examples for count in self._counts]
        return {
            "loss_first": sum(w * one.loss_first for w, one in zip(weights, said, strict=True)),
            "loss_last": sum(w * one.loss_last for w, one in zip(weights, said, strict=True)),
            "steps": max(one.steps for one in said),
            "tokens": sum(one.tokens for one in said),
            "seconds": max(one.seconds for one in said),
            "truncated": sum(one.truncated for one in said),
        }


def _for(id: str, request: TrainRequest, members: _Members) -> TrainRequest:
    """The relay's request as one of its devices gets it: with its own chance, and its own last round that counted."""
    seed = derive_seed(request.seed, id)
    return request.model_copy(update={"client": id, "seed": seed, "accepted": members.last.get(id, 0)})


def _read(folder: Path) -> _Members:
    try:
        return _Members.model_validate_json(read_bounded(folder / MEMBERS))
    except FileNotFoundError:
        return _Members()
    except (OSError, ValueError) as error:
        raise LegolmError(f"{folder / MEMBERS}: cannot be read ({brief(error)}); remove it") from None


def _together(scores: Sequence[Score]) -> Score:
    tokens, examples = sum(one.tokens for one in scores), sum(one.examples for one in scores)
    shares = [one.tokens / tokens for one in scores]
    errors = [one.stderr for one in scores]
    known: list[float] = [one for one in errors if one is not None]
    spread = sum((share * error) ** 2 for share, error in zip(shares, known, strict=False))
    return Score(
        loss=sum(share * one.loss for share, one in zip(shares, scores, strict=True)),
        stderr=math.sqrt(spread) if len(known) == len(scores) else None,
        exact_match=sum(one.examples * one.exact_match for one in scores) / examples,  # never above 1 by rounding
        tokens=tokens,
        examples=examples,
    )
