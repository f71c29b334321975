"""Flower's processes are kept running; one that will not run ends the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from legolm.config import SuperLinkConfig
from legolm.errors import LegolmError
from legolm.federate.transport import superlink
from legolm.federate.transport.superlink import EXEC, LINK, Flower
from legolm.system import free_port
from legolm.trust import make_authority, make_server

SLEEPS = ["sleep", "60"]


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flower]:
    """With programs that do nothing in the place of Flower's."""
    monkeypatch.setattr(Flower, "_superlink", lambda _: SLEEPS)
    monkeypatch.setattr(Flower, "_superexec", lambda _: SLEEPS)
    home = tmp_path / "federation"
    make_authority(home)
    make_server(home, ["127.0.0.1"])
    settings = SuperLinkConfig(home=str(home), host="127.0.0.1", port=free_port())
    with Flower(tmp_path / "flower", tmp_path, settings, lambda _: None) as found:
        yield found


def test_who_ends_with_the_superlink_is_started_again(flower: Flower) -> None:
    for _ in range(superlink.TRIES):
        flower._early.pop(LINK, None)  # of a SuperLink that ran for long each time
        flower._helpers.stop(EXEC, LINK)
        flower.wait(0)
    assert flower._helpers.alive(EXEC) and flower._helpers.alive(LINK)


@pytest.mark.parametrize("name", [EXEC, LINK])
def test_one_that_ends_by_itself_each_time_ends_the_run(flower: Flower, name: str) -> None:
    for _ in range(superlink.TRIES - 1):
        flower._helpers.stop(name)
        flower.wait(0)
    flower._helpers.stop(name)
    with pytest.raises(LegolmError, match=f"Flower's {name} ends as soon as it begins: it says nothing"):
        flower.wait(0)
