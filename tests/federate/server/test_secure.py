"""Rounds of secure sums: whole runs on a tiny model, against the same without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import adapter_keys, adapter_layout
from legolm.aggregate import held_by
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.client import Resident
from legolm.federate.server import secure as server_secure
from legolm.federate.transport import Exchange, Reply, Request, deployment, run_local
from legolm.federate.transport.engine import Body
from legolm.plan import make_plan
from legolm.privacy import Advert, Session, gaussian_epsilon
from legolm.runs import RoundRecord, RunDir, read_stage
from legolm.system import Progress
from legolm.trust import add_device, make_authority, make_key, make_server, write_roster
from residents import Residents


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Three different blocks; one client has twice as many rows."""
    found = three_clients(
        tmp_path, ("dense", "wide", "half"), rows=10, evaluate={"local_only": False, "others": 0, "every": 2}
    )
    more = [{"instruction": f"Tell {i}", "output": "zz"} for i in range(10)]
    with (tmp_path / "data" / "fr.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    found["data"]["limit_test"] = found["data"]["limit_validation"] = 1
    return found


def load(
    raw: dict[str, Any], secure: dict[str, Any] | None = None, dp: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    changed = {name: raw.get(name, {}) | section for name, section in sections.items()}
    return configs.validate(RunConfig, raw | changed | {"privacy": {"secure": secure, "dp": dp or {}}}, "test")


HELD = ("dense", "dense", "wide", "half")
NOISE = {"level": "client", "noise": "distributed", "noise_multiplier": 4.0, "clip": 1e-3}


def failing(phase: str, client: str | None, wrap: Callable[[], Exception]) -> Callable[..., None]:
    """The local engine, on which a client (None: everybody's line) does not answer in this phase of round 2."""

    def run(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def changed(exchange: Exchange) -> Exchange:
            def send(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                gone: set[int] = set()

                def passed() -> Iterator[Request]:
                    for index, one in enumerate(requests):
                        is_it = wire.kind_of(one.content) == phase and rb"\"round\":2" in one.content
                        if is_it and client is None:
                            raise wrap()
                        if is_it and client == one.client:
                            gone.add(index)
                        yield one

                for reply in exchange(passed(), deadline_s):
                    yield Reply(reply.index, error="the device is gone") if reply.index in gone else reply

            return send

        run_local(folder, config, actors, lambda exchange: body(changed(exchange)))

    return run


def test_three_blocks_end_as_without_and_after_a_kill(raw: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, config: RunConfig, **options: Any) -> None:
        pipeline.run(config, tmp_path / name, store=tmp_path / "store", models=False, **options)

    def states(name: str, number: int) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / f"rounds/000{number}/adapter.safetensors")

    secure = load(raw, {"withheld_limit": 1})
    run("plain", load(raw))
    run("secure", secure)
    plain, before, moved = states("plain", 1), states("plain", 0), 0
    for key, tensor in states("secure", 1).items():
        opened = tensor != before[key]
        moved += int(opened.sum())
        # Twice the rate times the steps, 0.04, in 10922 steps for three holders. Each is off by one step at most, and
        # they count 1, 1/2 and 1/2.
        assert torch.allclose(tensor[opened], plain[key][opened], atol=3 / 2 * 0.04 / 10922), key
    assert moved > 1000
    record = read_stage(tmp_path / "secure/rounds/0001")
    assert isinstance(record, RoundRecord)
    assert record.accepted == ["fr", "de", "es"]
    assert record.train == {}  # what a client says of its training is not told
    assert record.closed == pytest.approx(0.7)  # the block of one layer, with one of two KV groups
    assert record.shares == pytest.approx({"fr": 0.5, "de": 0.25, "es": 0.25}, abs=0.02)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", secure, engine=failing("unmask", None, lambda: RuntimeError("killed")))
    assert not (tmp_path / "killed" / ".secrets").exists()
    assert not (tmp_path / "killed" / "rounds/0002").exists()
    run("killed", secure, resume=True)
    ended = states("killed", 2)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in states("secure", 2).items())


def test_sums_have_room_for_the_rates_of_narrow_blocks(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["blocks"] = [raw["blocks"][1] | {"intermediate_size": 16}]  # of 96: six times the rate
    raw["clients"] = [client | {"block": "wide"} for client in raw["clients"]]
    found = {}
    for name, secure in (("plain", None), ("secure", {"withheld_limit": 0})):
        config = load(raw, secure, train={"by_width": True}, federation={"rounds": 1})
        pipeline.run(config, tmp_path / name, store=tmp_path / "store", models=False)
        found[name] = load_file(tmp_path / name / "rounds/0001/adapter.safetensors")
    before = load_file(tmp_path / "plain/rounds/0000/adapter.safetensors")
    assert max(float((tensor - before[key]).abs().max()) for key, tensor in found["plain"].items()) > 0.1
    for key, tensor in found["plain"].items():
        widest = 6 if ".mlp." in key else 1  # attention is as wide as the LLM's, and its numbers as fine as ever
        assert torch.allclose(tensor, found["secure"][key], atol=widest * 3 / 2 * 0.04 / 10922), key


def test_who_goes_in_mid_round_is_named_and_the_rest_opens(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["clients"] = [{"id": id, "data": "fr", "block": "wide"} for id in ("a", "b", "c", "d")]
    raw["blocks"] = raw["blocks"][1:2]
    config = load(raw, {"withheld_limit": 0})
    pipeline.run(config, tmp_path / "out", models=False, engine=failing("train", "b", RuntimeError))
    first, second = (read_stage(tmp_path / f"out/rounds/000{number}") for number in (1, 2))
    assert isinstance(first, RoundRecord)
    assert isinstance(second, RoundRecord)
    assert (first.accepted, first.closed) == (["a", "b", "c", "d"], 0)
    assert (second.accepted, second.closed) == (["a", "c", "d"], 0)
    assert [(one.client, one.reason) for one in second.refused] == [("b", "the device is gone")]
    states = [load_file(tmp_path / f"out/rounds/000{number}/adapter.safetensors") for number in (1, 2)]
    # The mean of three that are alike but for their batches: no noise is left of the fourth's masks.
    assert 0 < max(float((states[1][key] - tensor).abs().max()) for key, tensor in states[0].items()) < 0.03


def test_clients_add_noise_that_is_enough_for_each_atom_and_without_who_goes(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """All that moves is noise, 4e-3 on N and more where nobody goes; d goes in round 2.

    Of an atom's holders one may go and one tells what it knows, but it opens with three: so of three and of four alike
    the parts of two are enough, and each has the variance 4e-3² / 2.
    """
    raw["clients"] = [{"id": id, "data": "fr", "block": block} for id, block in zip("abcd", HELD, strict=True)]
    raw["aggregate"] = {"weight": "equal"}
    raw["train"]["steps"] = 1
    config = load(raw, {"withheld_limit": 1}, NOISE | {"dropouts": 1})
    plan = make_plan(config)
    assert [one.bytes_down for one in plan.clients] == [one.bytes_down for one in make_plan(load(raw)).clients]
    summary = pipeline.run(config, tmp_path / "out", models=False, engine=failing("train", "d", RuntimeError))
    assert summary.privacy is not None
    assert summary.privacy.epsilon == pytest.approx(gaussian_epsilon([4.0, 4.0], 1e-5))
    last = read_stage(tmp_path / "out/rounds/0002")
    assert isinstance(last, RoundRecord)
    assert last.accepted == ["a", "b", "c"]
    states = [load_file(tmp_path / f"out/rounds/000{number}/adapter.safetensors") for number in range(3)]
    coverages = {one: read_block(tmp_path / "out/blocks" / one).coverage for one in HELD}
    layout = adapter_layout(coverages["dense"], adapter_keys(coverages["dense"], None, trained=True), 4)
    all_four, all_three = (held_by(layout.shapes, [(coverages[one], 4) for one in HELD[:n]]) for n in (4, 3))

    def moved(number: int, four: int, three: int) -> torch.Tensor:
        """In this round, of entries that so many hold: of all four clients, and of the first three."""
        return torch.cat(
            [
                (states[number][key] - states[number - 1][key])[(all_four[key] == four) & (all_three[key] == three)]
                for key in layout.shapes
            ]
        )

    def deviation(number: int, four: int, three: int) -> float:
        return float(moved(number, four, three).square().mean().sqrt())

    part = 4e-3 / 2**0.5
    assert deviation(1, 4, 3) == pytest.approx(part * 4**0.5 / 4, rel=0.1)
    assert deviation(1, 3, 3) == pytest.approx(part * 3**0.5 / 3, rel=0.1)
    assert deviation(1, 3, 2) == pytest.approx(part * 3**0.5 / 3, rel=0.1)
    # d's part is lost, and the mean is over all that were asked.
    assert deviation(2, 4, 3) == pytest.approx(part * 3**0.5 / 4, rel=0.1)
    assert deviation(2, 3, 3) == pytest.approx(part * 3**0.5 / 3, rel=0.1)
    assert not moved(2, 3, 2).any()  # two are left of what a, b and d hold
    assert len(moved(1, 2, 2)) > 0  # and what a and b hold is never sent
    assert not moved(1, 2, 2).any()
    assert not list(tmp_path.glob("out/clients/*/*.safetensors"))  # what rounding took is not for the next round


def test_what_stays_closed_stays_with_a_servers_momentum_too(raw: dict[str, Any], tmp_path: Path) -> None:
    """What a, b and d hold opens in round 1, and not in round 2, from which d goes."""
    raw["clients"] = [{"id": id, "data": "fr", "block": block} for id, block in zip("abcd", HELD, strict=True)]
    config = load(raw, {"withheld_limit": 1}, aggregate={"server_optimizer": "fedavgm"})
    pipeline.run(config, tmp_path / "out", models=False, engine=failing("train", "d", RuntimeError))
    states = [load_file(tmp_path / f"out/rounds/000{number}/adapter.safetensors") for number in range(3)]
    coverages = {one: read_block(tmp_path / "out/blocks" / one).coverage for one in HELD}
    layout = adapter_layout(coverages["dense"], adapter_keys(coverages["dense"], None, trained=True), 4)
    four, three = (held_by(layout.shapes, [(coverages[one], 4) for one in HELD[:n]]) for n in (4, 3))
    moved = dict.fromkeys(("closed", "open"), 0)
    for key in layout.shapes:
        closed, opened = (four[key] == 3) & (three[key] == 2), three[key] == 3
        moved["closed"] += int((states[1][key] != states[0][key])[closed].sum())
        moved["open"] += int((states[2][key] != states[1][key])[opened].sum())
        for name in (key, f"first.{key}"):
            assert torch.equal(states[2][name][closed], states[1][name][closed]), name
    assert moved["closed"] > 0
    assert moved["open"] > 0


def test_devices_that_begin_anew_in_any_phase_end_with_the_same_sums(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their resident processes, with their own rows and blocks that they fetched, without Flower between.

    One loses its memory in another phase of each round, and another's reply is lost on its way. All three are needed:
    they are asked anew. After some gave their shares they would open no other sum: that round changes nothing.
    """
    home, ids = tmp_path / "federation", ("fr", "de", "es")
    make_authority(home)
    make_server(home, ["127.0.0.1"])
    for id in ids:
        add_device(home, id, make_key(tmp_path / "devices" / id))
    write_roster(home, tmp_path / "roster.json")
    devices = Residents(tmp_path, ids, roster=tmp_path / "roster.json")
    left = {phase: {"es", "de"} for phase in ("shares", "train", "confirm", "unmask")}

    def loses(client: str, request: bytes) -> int:
        for number, (phase, who) in enumerate(left.items(), 1):
            if wire.kind_of(request) == phase and b'\\"round\\":%d' % number in request and client in who:
                who.remove(client)
                if client == "de":
                    return 8 if number % 2 else 5
                devices.start(client)
        return 0

    devices.loses = loses
    for module, name in ((server_secure, "AGAIN_S"), (deployment, "AGAIN_S"), (deployment, "POLL_S")):
        monkeypatch.setattr(module, name, 0)
    federation = {"engine": "deployment", "rounds": 5, "superlink": {"home": str(home)}}
    raw["data"] = raw["data"] | {"validation": 0.1, "test": 0.2}
    evaluate = {"scores": "own", "others": None, "local_only": False, "every": 5}
    own = {name: value for name, value in raw["data"].items() if name != "train"}
    config = load(raw | {"data": own}, {"withheld_limit": 1}, federation=federation, evaluate=evaluate)
    pipeline.run(config, tmp_path / "out", store=tmp_path / "store", models=False, engine=devices)
    local = load(raw, {"withheld_limit": 1}, federation={"rounds": 5}, evaluate=evaluate)
    pipeline.run(local, tmp_path / "local", store=tmp_path / "store", models=False)

    assert not any(left.values())
    states = [load_file(tmp_path / f"out/rounds/000{number}/adapter.safetensors") for number in range(6)]
    for number in (1, 2, 3):
        wanted = load_file(tmp_path / f"local/rounds/000{number}/adapter.safetensors")
        assert all(torch.equal(tensor, states[number][key]) for key, tensor in wanted.items()), number
    assert all(torch.equal(tensor, states[4][key]) for key, tensor in states[3].items())
    assert any(not torch.equal(tensor, states[5][key]) for key, tensor in states[4].items())
    records = [read_stage(tmp_path / f"out/rounds/000{number}") for number in range(1, 6)]
    assert [one.accepted for one in records if isinstance(one, RoundRecord)] == [list(ids)] * 3 + [[], list(ids)]
    (lost,) = [one for one in records if isinstance(one, RoundRecord) and one.closed == 1]
    assert {one.client: one.reason.partition(";")[0] for one in lost.refused} == {
        "fr": "secure sum: nothing of it was opened",
        "de": "secure sum: nothing of it was opened",
        "es": "secure sum: es has no secrets of this sum",
    }
    assert all("it was lost; it is asked again" in line for line in devices.said[""] if "device de" in line)
    # Asked anew: rounds 2 and 3 were trained twice, but by es in 2; whose reply was lost did nothing twice.
    trained = [sum(line.startswith("train: answered") for line in devices.said[id]) for id in ids]
    assert trained == [7, 7, 6]
    for id, resident in devices.residents.items():
        assert isinstance(resident, Resident)
        (kept,) = resident._secrets.values()
        secret = json.loads(kept)["mask_secret"].encode()
        files = [path for path in (tmp_path / "devices" / id).rglob("*") if path.is_file()]
        assert len(files) > 5
        assert not any(secret in path.read_bytes() for path in files)

    # A device that was started for sums of many sends no change alone.
    alone = raw | {"data": own, "federation": federation | {"rounds": 1}, "evaluate": evaluate}
    said = StringIO()

    def enough(seconds: float) -> None:
        raise KeyboardInterrupt  # the server would ask until they send something

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("legolm.federate.server.gathering.time.sleep", enough)
        pipeline.run(
            configs.validate(RunConfig, alone, "test"),
            tmp_path / "alone",
            progress=Progress(Console(file=said, width=400)),
            store=tmp_path / "store",
            models=False,
            engine=devices,
        )
    assert said.getvalue().count("it asks for this device's change alone, and --roster is for sums of many") == 3
    assert "0 updates accepted" in said.getvalue()


def test_who_is_told_to_learn_from_something_else_is_in_no_sum(raw: dict[str, Any], tmp_path: Path) -> None:
    """One entry without end, and b learns nothing: the sum would tell more of the others."""
    raw["clients"] = [{"id": id, "data": "fr", "block": "wide"} for id in ("a", "b", "c", "d")]
    raw["blocks"] = raw["blocks"][1:2]

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def poisoned(requests: Iterable[Request]) -> Iterator[Request]:
            for one in requests:
                if one.client == "b" and wire.kind_of(one.content) == "train":
                    header, tensors = wire.unpack(one.content, wire.TrainRequest)
                    factors = tensors["factors"].clone()
                    factors[0] = 1e12
                    yield Request("b", wire.pack(header, tensors | {"factors": factors}))
                else:
                    yield one

        def changed(exchange: Exchange) -> None:
            body(lambda requests, deadline_s=None: exchange(poisoned(requests), deadline_s))

        run_local(folder, config, actors, changed)

    config = load(raw, {"withheld_limit": 0}, federation={"rounds": 1})
    pipeline.run(config, tmp_path / "out", models=False, engine=engine)
    record = read_stage(tmp_path / "out/rounds/0001")
    assert isinstance(record, RoundRecord)
    assert record.accepted == ["a", "c", "d"]
    assert record.refused[0].reason == "secure sum: b got another block wide or adapter than all are told"


def test_devices_that_are_hurried_or_are_to_read_their_rows_otherwise_are_in_no_sum(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that gives all but one no time, or fields of theirs that it knows, would see that one's change."""
    home, ids, lies = tmp_path / "federation", ("fr", "de", "es"), ["count", "time", "rows", "files"]
    make_authority(home)
    make_server(home, ["127.0.0.1"])
    for id in ids:
        add_device(home, id, make_key(tmp_path / "devices" / id))
    write_roster(home, tmp_path / "roster.json")

    class Lying(Residents):
        def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
            if node == "de" and lies and wire.kind_of(request) == ("keys" if lies[0] == "count" else "train"):
                lie, told = lies.pop(0), wire.read_welcome(welcome)
                left_s = 0.0 if lie == "time" else left_s
                if lie in ("count", "rows"):
                    data = told.data.model_copy(update={"limits": (1, 1, 1)})
                    welcome = told.model_copy(update={"data": data}).model_dump_json()
                if lie == "files":
                    (tmp_path / "out/blocks/wide/more.json").write_text("{}")
                    files = wire.block_files(tmp_path / "out/blocks/wide")
                    welcome = told.model_copy(update={"files": files}).model_dump_json()
            sent = super().push(node, welcome, request, left_s)
            (tmp_path / "out/blocks/wide/more.json").unlink(missing_ok=True)
            return sent

    raw["clients"] = [client | {"block": "wide"} for client in raw["clients"]]
    raw["blocks"] = raw["blocks"][1:2]
    devices = Lying(tmp_path, ids, roster=tmp_path / "roster.json")
    for module, name in ((server_secure, "AGAIN_S"), (deployment, "AGAIN_S"), (deployment, "POLL_S")):
        monkeypatch.setattr(module, name, 0)
    federation = {"engine": "deployment", "rounds": 1, "superlink": {"home": str(home)}}
    evaluate = {"scores": "own", "others": None, "local_only": False}
    own = {name: value for name, value in raw["data"].items() if name != "train"} | {"validation": 0.1, "test": 0.2}
    config = load(raw | {"data": own}, {"withheld_limit": 0}, federation=federation, evaluate=evaluate)
    pipeline.run(config, tmp_path / "out", models=False, engine=devices)
    record = read_stage(tmp_path / "out/rounds/0001")
    assert isinstance(record, RoundRecord) and record.accepted == list(ids) and not lies
    refused = [line for line in devices.said["de"] if line.startswith("a request was refused: secure sum: ")]
    rows, files = "de is to read its rows otherwise than all are told", "de got another block wide or adapter than all"
    for line, why in zip(refused, (rows, "time was over after 1 of 2 steps", rows, files), strict=True):
        assert why in line


def test_what_a_client_counts_is_known_to_all() -> None:
    def session(weight: str) -> Session:
        fields = {"run": "r", "round": 1, "k": 3, "targets": None, "rank": 1, "frozen_side": True}
        return Session.model_validate(fields | {"weight": weight, "weight_cap": 0.5})

    adverts = [
        Advert(client=id, seal_key="0" * 64, mask_key="0" * 64, held="0" * 64, examples=examples)
        for id, examples in (("a", 10), ("b", 20), ("c", 90), ("d", 1000))
    ]
    assert wire.counts(session("examples"), adverts, ["a", "b", "c"]) == {"a": 1 / 9, "b": 2 / 9, "c": 1}
    # 90 is lowered to the 30 of the two others together.
    assert wire.counts(session("capped"), adverts, ["a", "b", "c"]) == {"a": 1 / 3, "b": 2 / 3, "c": 1}


def test_a_bytes_reader_is_not_fooled() -> None:
    tensor = wire.to_tensor([b"ab", b"", b"c"])
    assert wire.from_tensor(tensor, [2, 0, 1]) == [b"ab", b"", b"c"]
    assert wire.from_tensor(wire.to_tensor([]), []) == []
    for wrong, sizes in ((tensor, [2, 2]), (tensor, [4, -1]), (tensor.float(), [3]), (None, [1])):
        with pytest.raises(LegolmError, match="not as many as its header says"):
            wire.from_tensor(wrong, sizes)


@pytest.mark.parametrize(
    ("secure", "sections", "says"),
    [
        ({}, {"aggregate": {"form": "exact"}}, "aggregate.scheme 'heteagg' with these settings needs each by itself"),
        ({}, {"aggregate": {"scheme": "median"}}, "aggregate.scheme 'median' with these settings needs each by itself"),
        ({}, {"aggregate": {"scheme": "trimmed_mean"}}, "aggregate.scheme 'trimmed_mean' with these settings"),
        ({}, {"aggregate": {"mask": "saliency"}}, "a saliency mask chooses each client's own"),
        ({}, {"aggregate": {"redraw": 1}}, "take aggregate.redraw 0"),
        ({}, {"aggregate": {"outliers": {"action": "clip"}}}, "no single change to judge"),
        ({}, {"federation": {"keep_updates": True}}, "set federation.keep_updates to false"),
        ({}, {"federation": {"codec": "int8"}}, "take out federation.codec int8"),
        ({}, {"federation": {"mode": "pooled"}}, "take mode federated"),
        ({}, {"federation": {"fraction": 0.5}}, "opens an entry of 3 holders or more, and a round has 2 clients"),
        ({}, {"privacy": NOISE | {"noise": "central"}}, "take privacy.dp.noise distributed"),
        ({}, {"privacy": NOISE | {"noise": "central", "level": "example"}}, "take privacy.dp.level client"),
        ({"colluders": 3}, {}, "with colluders 3 opens an entry of 5 holders or more, and there are 3 clients"),
    ],
)
def test_what_does_not_go_together(
    raw: dict[str, Any], secure: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    dp = sections.pop("privacy", {})
    with pytest.raises(LegolmError, match=r"privacy\.secure: ") as caught:
        load(raw | {"aggregate": {"weight": "equal"}} if dp else raw, secure, dp, **sections)
    assert says in str(caught.value)


def test_devices_train_nothing_alone(raw: dict[str, Any]) -> None:
    evaluate = {"scores": "own", "others": None, "local_only": True}
    sections = {"federation": {"engine": "deployment"}, "evaluate": evaluate}
    with pytest.raises(LegolmError, match=r"set evaluate\.local_only to false and federation\.personal_steps to 0"):
        load(raw, {}, **sections)


def test_the_dry_run_says_what_is_never_sent(raw: dict[str, Any]) -> None:
    with pytest.raises(LegolmError) as caught:
        make_plan(load(raw, {"withheld_limit": 0.5}))
    assert str(caught.value).startswith(
        "privacy.secure.withheld_limit 0.5: in round 1 70.0 % of the entries have fewer than 3 holders"
    )
    plan = make_plan(load(raw, {"withheld_limit": 0.7}))
    assert any("70 % of the entries have fewer than 3 holders and are never sent" in note for note in plan.notes)
    plain = make_plan(load(raw))
    assert [2 * one.bytes_up for one in plan.clients] == [one.bytes_up for one in plain.clients]
    assert np.all([one.bytes_down for one in plan.clients] == [one.bytes_down for one in plain.clients])
    late = raw | {"clients": [*raw["clients"][:2], raw["clients"][2] | {"joins": 2}]}
    for limit in (0.9, 1.0):  # not by the share alone: with nothing withheld too much there is still no sum
        says = r"privacy.secure: needs 3 clients, and 2 are asked in round 1; take it out"
        with pytest.raises(LegolmError, match=says):
            make_plan(load(late, {"withheld_limit": limit}))
