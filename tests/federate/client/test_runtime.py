"""What answers for clients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.federate import wire
from legolm.federate.client import ClientRuntime, runtime, simulated
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.finetune import Task
from legolm.models import load_model
from legolm.runs import RunDir


@pytest.mark.parametrize(("room", "cycle"), [(0, False), (0, True), (1 << 40, False)])
def test_one_model_is_in_memory_or_each_is_read_once(
    three_clients: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    cycle: bool,
) -> None:
    """As there is room for others; also where something, as a trainer from outside, makes one hold itself."""
    made, alive = list[weakref.ref[Any]](), list[int]()

    def load(*given: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        model = load_model(*given)
        if cycle:
            model.itself = [model]
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(runtime, "load_model", load)
    monkeypatch.setattr(runtime, "free_bytes", lambda device: room)
    gc.disable()
    try:
        raw = three_clients(tmp_path, ("wide", "half", "dense"))
        pipeline.run(configs.validate(RunConfig, raw, "test"), tmp_path / "out", models=False)
    finally:
        gc.enable()
    if room:
        assert alive == [0, 1, 2, 3]  # of the blocks, and of the LLM
    else:
        assert len(alive) > 9 and max(alive) <= 1  # the server's own beside the clients'


def test_a_model_in_which_something_failed_answers_nobody_else(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer from outside may leave anything behind."""
    asked: dict[str, bytes] = {}

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def told(exchange: Exchange) -> Exchange:
            def seen(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                def each() -> Iterator[Request]:
                    for one in requests:
                        if one.client == "es":
                            asked[wire.kind_of(one.content)] = one.content
                        yield one

                return exchange(each(), deadline_s)

            return seen

        run_local(run, config, actors, lambda exchange: body(told(exchange)))

    raw = three_clients(tmp_path, ("wide", "half", "dense"), evaluate={"scores": "own"})
    pipeline.run(configs.validate(RunConfig, raw, "test"), tmp_path / "out", engine=engine, models=False)
    site = simulated(RunDir(tmp_path / "out"))
    wanted = ClientRuntime(site).answer(asked["evaluate"])

    def fails(task: Task) -> None:
        task.model.get_input_embeddings().weight.data *= 2
        raise MemoryError

    broken = ClientRuntime(site)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(runtime, "train", fails)
        broken.answer(asked["train"])
    assert broken.answer(asked["evaluate"]) == wanted
