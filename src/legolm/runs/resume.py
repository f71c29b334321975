"""What a resumed run may change of its config: what does not change the past."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from legolm.config import BlockConfig, RunConfig

FREE = (
    "federation.engine",
    "federation.threads",
    "federation.deadline_s",
    "federation.min_replies",
    "federation.superlink.home",
    "federation.superlink.host",
    "federation.superlink.port",
    "federation.superlink.address",
    "federation.superlink.root_certificates",
    "evaluate.batch_size",
    "data.fetch",
    "report.tensorboard",
    "report.mlflow",
)
"""Fields that change nothing that was done."""
AGAIN: Mapping[str, tuple[str, ...]] = {
    # Alone, a client trains as many steps as in its rounds and the personal step.
    "federation.rounds": ("local", "personal", "final"),
    "federation.personal_steps": ("local", "personal", "final"),
    "federation.personal": ("personal", "final"),
    "federation.public": ("personal", "final"),
    "evaluate.local_only": ("personal", "final"),
    "evaluate.others": ("local", "personal"),
    # Who is there is also on whose data the others are scored.
    "final": (),
    "clients": ("local", "personal", "final"),
    "clients.joins": ("local", "personal", "final"),
    "clients.leaves": ("local", "personal", "final"),
}
"""Fields, those of clients without their places, that leave the rounds as they are, with the stages to make again."""
TAKES = ", ".join([*FREE, *AGAIN]) + " (in rounds to come)"
NAMED = {"clients": "id", "blocks": "name"}
"""Lists that may become longer, and what names their items."""


def again(field: str) -> tuple[str, ...] | None:
    """The stages to make again where this field changed; None where that is not said of it."""
    return AGAIN.get(re.sub(r"\.\d+\.", ".", field))


@dataclass(frozen=True)
class Difference:
    """A field by its path in the config, and its two values; a part that is not there is None."""

    field: str
    old: Any
    new: Any


def differences(known: RunConfig, asked: RunConfig) -> list[Difference]:
    """Every field that differs; blocks with their recovery decided, and last.

    Clients and blocks that came are one difference of `clients` or `blocks`, in names.
    """
    one, two = (config.model_copy(update={"blocks": _decided(config)}) for config in (known, asked))
    before, after = one.model_dump(mode="json"), two.model_dump(mode="json")
    came = []
    for field, name in NAMED.items():
        if len(after[field]) > (count := len(before[field])):
            came.append(Difference(field, *([one[name] for one in items] for items in (before[field], after[field]))))
            after[field] = after[field][:count]
    found = [*came, *_differences(before, after, "")]
    return sorted(found, key=lambda one: one.field.startswith("blocks."))  # their recovery may follow from the others


def refusal(one: Difference, known: RunConfig, asked: RunConfig, done: int) -> str | None:
    """Why a run with `done` finished rounds cannot go on with this change; None where it can."""
    if one.field == "federation.rounds" and one.new < done:
        return f"{done} rounds are done; give at least as many"
    if one.field == "clients":
        return _not_joined(known, asked, done)
    if one.field in FREE or one.field in AGAIN:
        return None
    if one.field == "blocks" and len(asked.blocks) > len(known.blocks) and len(asked.clients) > len(known.clients):
        return None  # of the clients that came
    section, _, rest = one.field.partition(".")
    index, _, field = rest.partition(".")
    if section == "clients" and field in ("joins", "leaves"):
        before, after = known.clients[int(index)], asked.clients[int(index)]
        other = [number for number in range(1, done + 1) if before.there(number) != after.there(number)]
        return f"round {other[0]} is done, with other clients" if other else None
    return f"a resumed run may change {TAKES}"


def _not_joined(known: RunConfig, asked: RunConfig, done: int) -> str | None:
    """Why other clients cannot be in the run from its next round on."""
    if len(asked.clients) < len(known.clients):
        return "clients that were there stay in the list; let them leave (`leaves`)"
    early = [one.id for one in asked.clients[len(known.clients) :] if one.joins <= done]
    return f"round {done} is done; let client {early[0]!r} join in round {done + 1} (`joins`)" if early else None


def settled(known: RunConfig, asked: RunConfig) -> RunConfig:
    """What the config leaves open, as the run decided it: `precision: auto`, and how long its blocks recover."""
    if asked.precision == "auto":
        asked = asked.model_copy(update={"precision": known.precision})
    was = {block.name: block for block in _decided(known)}
    if _decided(asked) == list(was.values()):
        return asked
    blocks = []
    for one in asked.blocks:
        old = was.get(one.name, one)
        decided = one.model_copy(update={"recover": one.recover.model_copy(update={"steps": old.recover.steps})})
        blocks.append(old if one.may_recover and decided == old else one)
    return asked.model_copy(update={"blocks": blocks})


def _decided(config: RunConfig) -> list[BlockConfig]:
    """The blocks with the steps of their recovery, 0 where there is none."""
    return [
        cut.model_copy(update={"recover": cut.recover.model_copy(update={"steps": cut.recover.steps or 0})})
        if block.may_recover
        else cut
        for block, cut in zip(config.blocks, config.cuts, strict=True)
    ]


def _differences(known: Any, asked: Any, field: str) -> Iterator[Difference]:
    parts: Sequence[Any] = ()
    if isinstance(known, dict) and isinstance(asked, dict):
        parts = [*known, *(key for key in asked if key not in known)]
        values = [(known.get(key), asked.get(key)) for key in parts]
    elif isinstance(known, list) and isinstance(asked, list) and len(known) == len(asked):
        parts, values = range(len(known)), list(zip(known, asked, strict=True))
    if parts:
        for part, (one, two) in zip(parts, values, strict=True):
            yield from _differences(one, two, f"{field}.{part}" if field else str(part))
    elif known != asked:
        yield Difference(field, known, asked)
