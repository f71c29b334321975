"""Every byte of a request and a reply that passes between the server and its devices is in some record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.federate.server import gathering
from legolm.federate.server import secure as server_secure
from legolm.federate.transport import deployment
from legolm.federate.wire import kind_of
from legolm.report import read_status
from legolm.runs import Summary, passed_of, read_stages, rounds_of, traffic_alone
from legolm.trust import add_device, make_authority, make_key, make_server, write_roster
from residents import Residents

IDS = ("fr", "de", "es")
Make = Callable[..., dict[str, Any]]


class Metered(Residents):
    """Bytes of requests and replies by what was asked; `fails` is called before a device is asked, as `loses`."""

    def __init__(self, folder: Path, fails: Callable[[Metered, str, str], int]) -> None:
        super().__init__(folder, IDS, roster=folder / "roster.json" if (folder / "roster.json").exists() else None)
        self.loses = lambda client, request: fails(self, client, kind_of(request))
        self.down = self.up = 0

    def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        self.down += len(request)
        return super().push(node, welcome, request, left_s)

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        found = super().pull(ids)
        self.up += sum(len(reply) for _, reply in found)
        return found


def run(make: Make, folder: Path, devices: Metered, **sections: Any) -> Summary:
    raw = make(folder, ("dense",) * 3)
    raw["data"] = {name: value for name, value in raw["data"].items() if name != "train"}
    raw["data"] |= {"validation": 0.1, "test": 0.2}
    superlink = {"address": "127.0.0.1:1"}  # the engine here needs none
    raw["federation"] = {"engine": "deployment", "rounds": 1, "superlink": superlink} | sections.pop("federation", {})
    raw["evaluate"] = {"scores": "own", "local_only": False} | sections.pop("evaluate", {})
    config = configs.validate(RunConfig, raw | sections, "test")
    return pipeline.run(config, folder / "out", models=False, engine=devices)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (server_secure, gathering, deployment):
        monkeypatch.setattr(module, "AGAIN_S", 0)
    monkeypatch.setattr(deployment, "POLL_S", 0)


def recorded(folder: Path) -> tuple[int, int]:
    records = read_stages(folder / "out" / "metrics.jsonl")
    sent = [*(one.sent for one in rounds_of(records)), traffic_alone(records)]
    return sum(one.up for each in sent for one in each.values()), sum(
        one.down for each in sent for one in each.values()
    )


def test_of_all_attempts_at_a_secure_sum(three_clients: Make, tmp_path: Path) -> None:
    home, left = tmp_path / "federation", [0] * 2
    make_authority(home)
    make_server(home, ["127.0.0.1"])
    for id in IDS:
        add_device(home, id, make_key(tmp_path / "devices" / id))
    write_roster(home, tmp_path / "roster.json")

    def fails(devices: Metered, client: str, kind: str) -> int:
        if kind == "confirm" and client == "es" and left:
            left.pop()
            devices.start(client)  # which loses what it has in memory: all are asked anew
        return 0

    devices = Metered(tmp_path, fails)
    privacy, federation = {"secure": {"withheld_limit": 1}}, {"superlink": {"home": str(home)}}
    run(three_clients, tmp_path, devices, privacy=privacy, federation=federation, aggregate={"weight": "equal"})
    assert not left
    assert recorded(tmp_path) == (devices.up, devices.down)


def test_of_a_device_that_is_asked_again(three_clients: Make, tmp_path: Path) -> None:
    left = [0] * 2

    def fails(devices: Metered, client: str, kind: str) -> int:
        if kind == "train" and client == "es" and left:
            left.pop()
            return 1
        return 0

    devices = Metered(tmp_path, fails)
    found = run(three_clients, tmp_path, devices, federation={"min_replies": 3})
    assert not left
    assert found.history[1].accepted == list(IDS)
    assert recorded(tmp_path) == (devices.up, devices.down)


def test_of_training_outside_the_rounds(three_clients: Make, tmp_path: Path) -> None:
    """The first that a client trains is its baseline, which is refused at one of them."""
    left = [0]

    def fails(devices: Metered, client: str, kind: str) -> int:
        return 1 if kind == "train" and client == "es" and left and not left.pop() else 0

    devices = Metered(tmp_path, fails)
    federation = {"personal_steps": 1}
    found = run(three_clients, tmp_path, devices, federation=federation, evaluate={"local_only": True})
    assert recorded(tmp_path) == (devices.up, devices.down)
    records = read_stages(tmp_path / "out" / "metrics.jsonl")
    assert [one.client for one in passed_of(records)] == ["es"]
    alone = sum(one.up + one.down for one in traffic_alone(records).values())
    assert 0 < alone == found.bytes_alone < devices.up + devices.down
    clients = read_status(tmp_path / "out")["clients"].values()
    assert sum(one["bytes_up"] + one["bytes_down"] for one in clients) == devices.up + devices.down
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Training outside the rounds took {found.bytes_alone / 1e6:,.2f} MB" in page
