"""A round of devices of their own with too few updates is not the run's end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server import gathering
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.federate.wire import kind_of
from legolm.runs import RunDir, Summary
from legolm.system import Progress


def with_absent(asked: list[list[str]], raw: dict[str, Any], out: Path, engine: str) -> tuple[Summary, str]:
    """A run whose first two times of training only `fr` answers; who was asked, in `asked`."""

    def run_engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def absent(exchange: Exchange) -> None:
            def ask(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                sent = list(requests)
                away = kind_of(sent[0].content) == "train"
                if away:
                    asked.append(sorted(one.client for one in sent))
                for reply in exchange(sent, deadline_s):
                    gone = away and len(asked) < 3 and sent[reply.index].client != "fr"
                    yield Reply(reply.index, error="late") if gone else reply

            body(ask)

        run_local(run, config, actors, absent)

    superlink = {"address": "127.0.0.1:1"}  # the engine here needs none
    raw["federation"] |= {"engine": engine, "rounds": 1, "min_replies": 3, "superlink": superlink}
    said = StringIO()
    progress = Progress(Console(file=said, width=300))
    config = configs.validate(RunConfig, raw, "test")
    return pipeline.run(config, out, engine=run_engine, progress=progress, models=False), said.getvalue()


def test_devices_are_asked_again(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "AGAIN_S", 0.0)
    raw = three_clients(tmp_path, ("wide",) * 3, evaluate={"scores": "own", "local_only": False})
    asked: list[list[str]] = []
    summary, said = with_absent(asked, raw, tmp_path / "out", "deployment")
    assert asked == [["de", "es", "fr"], ["de", "es"], ["de", "es"]]
    assert summary.history[-1].accepted == ["fr", "de", "es"] and not summary.history[-1].refused
    assert "round 1: 1 updates accepted, federation.min_replies is 3; asked again: de (late), es (late)" in said
    assert (tmp_path / "out" / "report.html").exists()
    with pytest.raises(LegolmError, match="1 updates accepted"):
        with_absent([], raw, tmp_path / "local", "local")
