"""Devices that say what they can hold, and get the largest block that fits."""

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
from legolm.federate.client import block_folder
from legolm.federate.server import place
from legolm.federate.transport import Reply, Request
from legolm.federate.wire import DeviceReply, Offer, OfferRequest, largest, pack, unpack
from legolm.plan import make_plan
from legolm.report import print_plan, read_status
from legolm.runs import RunDir
from legolm.system import Progress
from residents import Residents

BIG, SMALL = "a" * 32, "b" * 32


def offered(deadline_s: float | None = None) -> OfferRequest:
    """A large block of 4 GB and a small one of 1 GB; their rounds are 1e12 and 1e11 operations."""
    big = Offer(name="big", id=BIG, parameters=9, bytes=2 * 10**9, memory=4 * 10**9, operations=1e12, tokens=100)
    small = Offer(name="small", id=SMALL, parameters=3, bytes=10**9, memory=10**9, operations=1e11, tokens=100)
    return OfferRequest(run="", client="", precision="fp32", deadline_s=deadline_s, offers=[small, big])


@pytest.mark.parametrize(
    ("device", "deadline_s", "wanted"),
    [
        ({}, None, "big"),
        ({"memory": 3.9e9}, None, "small"),
        ({"memory": 0.9e9}, None, "'small', needs 1,000 MB of memory to train, and it has 900 MB"),
        ({"disk": 1.9e9}, None, "small"),
        ({"disk": 1.9e9, "held": [BIG]}, None, "big"),
        ({"disk": 10.0}, None, "needs 1,000 MB of disk, and 0 MB are free"),
        ({}, 100.0, "big"),  # as long as a round at its speed
        ({}, 99.0, "small"),
        ({}, 9.0, "takes 10 s a round at its speed, and federation.deadline_s is 9"),
    ],
)
def test_the_largest_that_fits(device: dict[str, Any], deadline_s: float | None, wanted: str) -> None:
    said = DeviceReply.model_validate({"memory": 4e9, "disk": 2e9, "speed": 1e10, "held": []} | device)
    found = largest(offered(deadline_s), said)
    assert wanted in found if isinstance(found, str) else found.name == wanted


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A run on devices of their own: `fr` and `es` say what they can hold, `de` has a block."""
    raw = three_clients(tmp_path, ("wide", "half", "dense"), evaluate={"scores": "own", "local_only": False})
    raw["federation"] |= {"engine": "deployment", "superlink": {"address": "127.0.0.1:1"}, "rounds": 1}
    raw["federation"] |= {"min_replies": 3, "codec": "int8"}  # devices keep what it loses
    for at in (0, 2):
        raw["clients"][at]["block"] = "auto"
    del raw["data"]["train"]
    return raw


def test_devices_get_blocks_by_what_they_say(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, said = configs.validate(RunConfig, raw, "test"), StringIO()
    plan = make_plan(config)
    print_plan(plan, config)
    assert "auto, at most dense" in capsys.readouterr().out
    needs = {one.name: one.least_bytes / 1e6 for one in plan.blocks}
    assert needs["half"] < needs["wide"] < needs["dense"]
    devices = Residents(tmp_path, ("fr", "de", "es"), {"fr": needs["wide"], "es": needs["half"] - 1})
    progress = Progress(Console(file=said, width=300))
    summary = pipeline.run(config, tmp_path / "out", engine=devices, progress=progress, models=False)

    assert {one.id: one.block for one in summary.clients} == {"fr": "wide", "de": "half"}
    assert summary.history[-1].accepted == ["fr", "de"]
    assert f"device fr: block 'wide' ({needs['wide']:,.0f} MB of memory, at most " in said.getvalue()
    assert "device es: takes no part: no block fits it: the smallest, 'half', needs" in said.getvalue()
    (line,) = devices.said["es"]
    assert line.startswith("this device takes no part: no block fits it: the smallest, 'half', needs")
    assert "block wide: is the largest that fits this device" in devices.said["fr"]
    assert list(read_status(tmp_path / "out")["clients"]) == ["fr", "de"]

    # Whoever goes on with the run asks nobody again.
    again = Residents(tmp_path, ("fr", "de", "es"))
    found = pipeline.run(config, tmp_path / "out", resume=True, engine=again, models=False)
    assert {one.id: one.block for one in found.clients} == {"fr": "wide", "de": "half"} and not again.said["es"]
    run = RunDir(tmp_path / "out")
    other = configs.validate(RunConfig, raw | {"clients": [{"id": "fr", "block": "half"}, *raw["clients"][1:]]}, "")
    with pytest.raises(LegolmError, match=r"`clients\.0\.block` differs"):
        run.check(run.settled(other), resume=True)


def test_who_cannot_say_gets_the_smallest_and_nobody_is_an_error() -> None:
    small = DeviceReply(memory=1.0, disk=1e12, speed=1e9, held=[])
    answers = {"fr": pack(small, {}), "de": b"hello", "es": b""}

    def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        for index, one in enumerate(requests):
            yield Reply(index, answers[one.client], "" if answers[one.client] else "late")

    said = StringIO()
    found = place(offered(), list(answers), exchange, Progress(Console(file=said, width=300)))
    assert {id: one.block for id, one in found.items()} == {"fr": None, "de": "small", "es": "small"}
    assert "device es: did not say what it holds (late); it gets block 'small'" in said.getvalue()
    with pytest.raises(LegolmError, match=r"no device has room for any block \(fr: no block fits it"):
        place(offered(), ["fr"], exchange, Progress())


def test_a_block_that_is_here_already(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert block_folder(str(tmp_path)) == tmp_path
    for wrong, says in (("no/such", "no earlier download is here"), (str(tmp_path / "x"), "nor a hub id")):
        with pytest.raises(LegolmError, match=f"--block {wrong}: .*{says}"):
            block_folder(wrong)


def test_a_block_by_device_is_for_devices_and_unequal_schemes(raw: dict[str, Any]) -> None:
    with pytest.raises(LegolmError, match="has none; give `profile`"):
        configs.validate(RunConfig, raw | {"federation": {"engine": "local"}}, "test")
    with pytest.raises(LegolmError, match="blocks: 'auto' stands for"):
        configs.validate(RunConfig, raw | {"blocks": [*raw["blocks"], {"name": "auto", "method": "dense"}]}, "test")
    with pytest.raises(LegolmError, match="take `profile` out"):
        clients = [{"id": "fr", "block": "auto", "profile": {"memory_mb": 1}}]
        configs.validate(RunConfig, raw | {"clients": clients}, "test")
    config = configs.validate(RunConfig, raw | {"aggregate": {"scheme": "fedavg"}}, "test")
    with pytest.raises(LegolmError, match="trains the block that its device can hold, and it averages equal adapters"):
        make_plan(config)


def test_an_offer_is_of_the_tokens_that_a_round_may_train_on(raw: dict[str, Any], tmp_path: Path) -> None:
    offers: list[OfferRequest] = []

    def asked(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        offers.extend(unpack(one.content, OfferRequest)[0] for one in requests)
        raise KeyboardInterrupt

    raw["train"] |= {"steps": 100, "tokens": 60}
    config = configs.validate(RunConfig, raw, "test")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, tmp_path / "out", engine=lambda *given: given[-1](asked), models=False)
    step = config.train.batch_size * config.train.max_length
    assert {one.tokens for request in offers for one in request.offers} == {step}
