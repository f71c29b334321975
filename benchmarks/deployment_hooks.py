"""`python benchmarks/deployment_hooks.py FOLDER [legolm's arguments]`: legolm, and others see at which moment it is.

Each moment of a round is a line of FOLDER/moments.jsonl. Where there is a file `hold-MOMENT-ROUND`, the process waits
there until it is gone; `alter-ROUND` says what becomes of the round's reply. Nothing else is different.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOOK_S = 0.02


def hook(folder: Path) -> None:
    """Put the moments into legolm's own calls."""
    from legolm import finetune
    from legolm.adapter import Tensors
    from legolm.aggregate import Weighing
    from legolm.federate.client import resident, runtime
    from legolm.federate.transport.superlink import Flower
    from legolm.federate.wire import TrainRequest, UpdateReply, kind_of, pack, unpack
    from legolm.runs import RoundRecord, Stages

    number = 0

    def reached(moment: str, round: int) -> None:
        with (folder / "moments.jsonl").open("a") as lines:
            lines.write(json.dumps({"moment": moment, "round": round, "at": time.time()}) + "\n")
        while (folder / f"hold-{moment}-{round}").exists():
            time.sleep(LOOK_S)

    def round_of(request: bytes) -> int:
        """Of a request to train in a round, else -1."""
        if kind_of(request) != "train":
            return -1
        header = unpack(request, TrainRequest)[0]
        return header.round if header.phase == "round" else -1

    # The device.

    train, answer = finetune.train, resident.Resident.answer

    def training(task: Any) -> Any:
        reached("training", number)
        found = train(task)
        reached("trained", number)
        return found

    def altered(reply: bytes, round: int) -> bytes:
        path = folder / f"alter-{round}"
        how = path.read_text() if path.exists() else ""
        if how == "truncated":
            return reply[: len(reply) // 2]
        if how == "another run's":
            header, tensors = unpack(reply, UpdateReply)
            return pack(header.model_copy(update={"run": "0" * 16}), tensors)
        return b"\0\xff" * 500 if how == "noise" else reply

    def answered(
        self: resident.Resident, welcome: str, request: bytes, left_s: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        nonlocal number
        if (round := round_of(request)) < 0:
            return answer(self, welcome, request, left_s)
        number = round
        reached("asked", round)
        header, reply = answer(self, welcome, request, left_s)
        if header:
            return header, reply
        reached("answered", round)
        return header, altered(reply, round)

    # The server.

    push, pull, finish, fill = Flower.push, Flower.pull, Weighing.finish, Stages.fill

    def pushed(self: Flower, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        nonlocal number
        if (round := round_of(request)) >= 0:
            number = round
            reached("sending", round)
        return push(self, node, welcome, request, left_s)

    def pulled(self: Flower, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        found = pull(self, ids)
        if any(content for _, content in found):
            reached("receiving", number)
        return found

    def finished(self: Weighing) -> dict[str, float]:
        reached("aggregating", number)
        return finish(self)

    def filled(self: Stages, partial: Path, path: Path, adapter: Tensors, record: Any) -> None:
        if not isinstance(record, RoundRecord):
            fill(self, partial, path, adapter, record)
            return
        reached("storing", record.round)
        fill(self, partial, path, adapter, record)
        reached("writing", record.round)

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (runtime, "train", training),
        (resident.Resident, "answer", answered),
        (Flower, "push", pushed),
        (Flower, "pull", pulled),
        (Weighing, "finish", finished),
        (Stages, "fill", filled),
    ]
    for where, name, what in changed:
        setattr(where, name, what)


if __name__ == "__main__":
    hook(Path(sys.argv[1]))
    sys.argv = ["legolm", *sys.argv[2:]]
    from legolm.cli import main

    main()
