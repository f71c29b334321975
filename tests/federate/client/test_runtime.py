"""What answers for clients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.federate.client import runtime
from legolm.models import load_model


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
