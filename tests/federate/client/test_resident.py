"""A device's resident process: its block by pieces, its rows, and one answer to one request."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import with_prefix
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.bridge import PIECE, Link, connect, listen
from legolm.federate.client import Holdings, Profile, Resident, answering
from legolm.federate.client.fetch import UnreachableError, find_block
from legolm.federate.transport import run_local
from legolm.federate.wire import (
    EvaluateRequest,
    Otherwise,
    OwnData,
    UpdateReply,
    Welcome,
    block_files,
    kind_of,
    own_data,
    pack,
    read_welcome,
    unpack,
)
from legolm.runs import Kept, RunDir
from residents import Residents

DATA = OwnData(
    rows=configs.RowsConfig(), validation=0.1, test=0.2, limits=(None, None, None), system=None, part="fr", seed=0
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of three pieces, one of none and one in a folder."""
    folder = tmp_path_factory.mktemp("files") / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(torch.arange(2 * PIECE + 5, dtype=torch.uint8).numpy()))
    (folder / "empty").touch()
    (folder / "sub" / "config.json").write_text("{}")
    return folder


class Server:
    """Gives pieces of `folder`, and goes away after `pieces` of them."""

    def __init__(self, folder: Path, pieces: int = 1000) -> None:
        self._folder, self.left, self.asked = folder, pieces, list[tuple[str, int]]()

    def piece(self, path: str, at: int) -> bytes:
        if len(self.asked) >= self.left:
            raise UnreachableError("gone")
        self.asked.append((path, at))
        return (self._folder / path.partition("/")[2]).read_bytes()[at : at + PIECE]


def welcome_of(folder: Path) -> Welcome:
    return Welcome(run="0" * 16, client="fr", block="a", files=block_files(folder), data=DATA)


def test_a_block_comes_once_and_goes_on_after_a_cut(files: Path, tmp_path: Path) -> None:
    welcome, said = welcome_of(files), list[str]()
    first = Server(files, pieces=3)
    with pytest.raises(UnreachableError):
        find_block(welcome, tmp_path, [], first.piece, said.append)
    second = Server(files)
    found = find_block(welcome, tmp_path, [], second.piece, said.append)
    assert len(first.asked) == 3 and not set(first.asked) & set(second.asked)
    assert len(first.asked + second.asked) == sum(len(one.pieces) for one in welcome.files) == 4
    assert block_files(found) == block_files(files)
    third = Server(files, pieces=0)
    assert find_block(welcome, tmp_path, [], third.piece, said.append) == found
    assert find_block(welcome, tmp_path / "other", [tmp_path, files], third.piece, said.append) == files


def test_a_block_needs_room_at_home(files: Path, small_disk: Path) -> None:
    with pytest.raises(LegolmError, match="free some space or give another --home"):
        find_block(welcome_of(files), small_disk, [], Server(files).piece, print)


def test_what_another_block_here_has_does_not_come_again(files: Path, tmp_path: Path) -> None:
    """As with the same weights beside other frozen factors, in a folder that was given or from an earlier run."""
    other, said = tmp_path / "other", list[str]()
    shutil.copytree(files, other)
    (other / "sub" / "config.json").write_text("[]")
    server = Server(other)
    found = find_block(welcome_of(other), tmp_path / "home", [files], server.piece, said.append)
    assert [name for name, _ in server.asked] == ["a/sub/config.json"] and "0.0 MB to fetch" in said[-1]
    assert block_files(found) == block_files(other)
    (other / "sub" / "config.json").write_text("{1}")
    server = Server(other)
    find_block(welcome_of(other), tmp_path / "home", [], server.piece, said.append)
    assert [name for name, _ in server.asked] == ["a/sub/config.json"]


def test_wrong_pieces_are_not_kept(files: Path, tmp_path: Path) -> None:
    welcome = welcome_of(files)
    with pytest.raises(LegolmError, match="came 3 times, and never as the server told it"):
        find_block(welcome, tmp_path, [], lambda path, at: b"x", lambda text: None)
    assert not (tmp_path / "blocks" / welcome.block_id).exists()
    (path,) = (tmp_path / "blocks").iterdir()  # what of it was damaged on the disk comes again
    server = Server(files)
    for one in welcome.files:
        (path / one.name).parent.mkdir(exist_ok=True)
        (path / one.name).write_bytes(b"y" * one.bytes)
    assert block_files(find_block(welcome, tmp_path, [], server.piece, lambda text: None)) == welcome.files


def test_what_changed_here_comes_again(files: Path, tmp_path: Path) -> None:
    welcome, said = welcome_of(files), list[str]()
    path = find_block(welcome, tmp_path, [], Server(files).piece, said.append)
    with (path / "weights").open("r+b") as file:
        file.seek(PIECE + 7)
        file.write(b"damaged")
    (path / "sub" / "added").write_text("read by who loads the block")
    with pytest.raises(UnreachableError):
        find_block(welcome, tmp_path, [], Server(files, pieces=0).piece, said.append)
    assert not path.exists()  # nobody takes it as it is
    server = Server(files)
    assert block_files(find_block(welcome, tmp_path, [], server.piece, said.append)) == welcome.files
    assert server.asked == [("a/weights", PIECE)]
    assert said[1] == f"block a: weights, sub/added in {path} changed since it came; what differs comes again"


def test_what_the_server_did_not_tell_of_is_in_no_block(files: Path, tmp_path: Path) -> None:
    """Left by a process that ended between taking a changed block away and mending it."""
    welcome = welcome_of(files)
    partial = tmp_path / "blocks" / f".{welcome.block_id}.partial"
    partial.mkdir(parents=True)
    (partial / "added").write_text("read by who loads the block")
    path = find_block(welcome, tmp_path, [], Server(files).piece, lambda text: None)
    assert block_files(path) == welcome.files and not (path / "added").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", ".hidden", "a//b", "a\\b\x00"])
def test_a_server_names_no_file_elsewhere(files: Path, name: str) -> None:
    whole = welcome_of(files).model_dump()
    whole["files"][0]["name"] = name
    with pytest.raises(ValueError, match="name"):
        Welcome.model_validate(whole)
    with pytest.raises(LegolmError, match="is it of another version of legolm"):
        read_welcome(json.dumps(whole))


def test_kept_replies(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "replies", most=2)
    for early in (b"x", b"y"):  # of a clock that was a day ahead
        kept.put(early, early)
    for file in (tmp_path / "replies").iterdir():
        os.utime(file, (time.time() + 86400,) * 2)
    kept.put(b"z", b"z")
    assert kept.get(b"z") == b"z"
    for file in (tmp_path / "replies").iterdir():
        file.unlink()
    for number in range(4):
        kept.put(bytes([number]), b"reply" * number)
    assert [kept.get(bytes([number])) for number in range(4)] == [None, None, b"reply" * 2, b"reply" * 3]
    (file,) = [one for one in (tmp_path / "replies").iterdir() if one.read_bytes().endswith(b"reply" * 3)]
    file.write_bytes(file.read_bytes()[:-1])
    assert kept.get(bytes([3])) is None


def test_work_is_kept_in_memory_while_the_disk_is_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ROOM_S", 0.01)
    filler, said, work = small_disk / "filler", list[str](), list[bytes]()

    class Working(answering.Answering):
        def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
            work.append(request)
            if len(work) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            filler.write_bytes(b"x" * 50_000)
            return b"y" * 30_000

    def note(text: str) -> None:
        said.append(text)
        if "is in memory" in text:
            filler.unlink()

    device, request = Working(small_disk, "fr", note), pack(welcome_of(small_disk), {})
    monkeypatch.setattr(answering, "kind_of", lambda request: "train")
    told = welcome_of(small_disk).model_dump_json()
    header, _ = device.answer(told, request)
    assert "its disk is full" in header["again"] and "waits until there is room" in said[0]
    for _ in range(2):
        assert device.answer(told, request) == ({}, b"y" * 30_000)
    assert len(work) == 2 and sum("is in memory" in line for line in said) == 1


def test_a_device_answers_as_the_simulation(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Every request of a run, asked of a device that has its own file only; twice, and trained once."""
    changes = {"evaluate": {"scores": "own", "local_only": False}}
    config = configs.validate(RunConfig, three_clients(tmp_path, ("wide",) * 3, **changes), "test")
    asked: list[tuple[str, bytes, bytes]] = []

    def engine(run: RunDir, config: RunConfig, actors: int, body: Any) -> None:
        def recorded(exchange: Any) -> None:
            def record(requests: Any, deadline_s: float | None = None) -> Any:
                sent = list(requests)
                for reply in exchange(sent, deadline_s):
                    if sent[reply.index].client == "fr":
                        asked.append((sent[reply.index].client, sent[reply.index].content, reply.content))
                    yield reply

            body(record)

        run_local(run, config, actors, recorded)

    pipeline.run(config, tmp_path / "out", engine=engine, models=False)
    block, said = RunDir(tmp_path / "out").block("wide"), list[str]()
    run = RunDir(tmp_path / "out").identity().run
    told = Welcome(run=run, client="fr", block="wide", files=block_files(block), data=own_data(config, "fr"))
    held = Holdings(tmp_path / "home", (str(tmp_path / "data" / "fr.jsonl"),), (block,), Profile("cpu"))
    resident = Resident(held, "fr", Server(block, pieces=0).piece, said.append)
    for _, request, reply in asked:
        for _ in range(2):
            header, found = resident.answer(told.model_dump_json(), request)
            assert header == {}
        assert _timeless(found) == _timeless(reply)
    assert len(asked) == 5 and sum("answered in" in line for line in said) == 5
    train = next(request for _, request, _ in asked if kind_of(request) == "train")
    hurried = Resident(replace(held, home=tmp_path / "hurried"), "fr", Server(block, pieces=0).piece, said.append)
    for left_s, steps in ((0.0, 1), (1000.0, 1)):  # and what was answered once stays
        reply = hurried.answer(told.model_dump_json(), train, left_s)[1]
        assert unpack(reply, UpdateReply)[0].metrics["steps"] == steps
    assert unpack(resident.answer(told.model_dump_json(), train)[1], UpdateReply)[0].metrics["steps"] == 2
    other = Resident(held, "de", Server(block, pieces=0).piece, said.append)
    Kept(tmp_path / "home" / "runs" / run / "replies").put(asked[0][1], b"")
    assert "this device is 'de'" in other.answer(told.model_dump_json(), asked[1][1] + b" ")[0]["error"]
    score, content = unpack(next(request for _, request, _ in asked if kind_of(request) == "evaluate"), EvaluateRequest)
    unequal = Otherwise(rank=score.rank, ranks={}, prompts=1, away=0.0)
    both = content | with_prefix("otherwise", {name: tensor.clone() for name, tensor in content.items()})
    by_input = pack(score.model_copy(update={"otherwise": unequal}), both)
    assert "would tell the tokens" in resident.answer(told.model_dump_json(), by_input)[0]["error"]
    assert "message is broken" in resident.answer(told.model_dump_json(), b"hello")[0]["error"]


def test_another_run_of_one_config_and_other_rows_are_trained_anew(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("dense",) * 3, evaluate={"scores": "own", "local_only": False})
    raw["federation"] = {"engine": "deployment", "superlink": {"address": "127.0.0.1:1"}, "rounds": 1}
    del raw["data"]["train"]
    config, devices = configs.validate(RunConfig, raw, "test"), Residents(tmp_path, ("fr", "de", "es"))

    def run(out: str, **options: Any) -> str:
        pipeline.run(config, tmp_path / out, store=tmp_path / "store", engine=devices, models=False, **options)
        return RunDir(tmp_path / out).identity().run

    def trained() -> list[int]:
        return [sum(line.startswith("train: answered") for line in said) for said in devices.said.values() if said]

    first = run("one")
    assert trained() == [1, 1, 1]
    assert run("two") != first
    assert trained() == [2, 2, 2]
    assert run("one", resume=True) == first
    asked = list(zip(devices.wire[::4], devices.wire[1::4], strict=True))
    welcome, request = next((told, one) for told, one in asked if kind_of(one) == "train" and b'"client":"es"' in told)
    for more, times in (("", 2), (json.dumps({"instruction": "Tell", "output": "zz"}) + "\n", 3)):
        with (tmp_path / "data" / "es.jsonl").open("a") as file:
            file.write(more)
        devices.start("es")
        assert devices.residents["es"].answer(welcome.decode(), request)[0] == {}
        assert trained() == [2, 2, times]


def test_a_device_for_sums_answers_what_they_ask_and_nothing_else(files: Path, tmp_path: Path) -> None:
    """Second moments of its text alone are not what many add up; nor is what a later version may ask."""
    held = Holdings(tmp_path / "home", (), roster=tmp_path / "roster.json")
    device = Resident(held, "fr", Server(files).piece, lambda text: None)

    def said(kind: str) -> str:
        return str(device.answer(welcome_of(files).model_dump_json(), _asking(kind))[0]["error"])

    assert said("calibrate").startswith("it asks for this device's second moments alone, and --roster is for sums")
    assert said("gradients").startswith("it asks for this device's answer to 'gradients' alone, and --roster is for")
    for kind in ("keys", "shares", "confirm", "unmask", "evaluate"):
        assert "alone" not in said(kind)


def test_errors_tell_the_server_nothing_of_rows(files: Path, tmp_path: Path) -> None:
    """What is wrong with them, and where they are, is for who started the device."""
    path, said, told = tmp_path / "home of Ann" / "rows.jsonl", list[str](), welcome_of(files).model_dump_json()
    path.parent.mkdir()
    turns = [{"role": "HIV positive since 2004", "content": "x"}, {"role": "assistant", "content": "y"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    for data in (path, path.with_name("none.jsonl")):
        device = Resident(Holdings(tmp_path / "home", (str(data),)), "fr", Server(files).piece, said.append)
        assert device.answer(told, _asking("train")) == ({"error": answering.OWN}, b"")
    assert "rows.jsonl:1: `messages[0]` has role 'HIV positive since 2004'" in said[0] and "none.jsonl" in said[1]

    class Failing(answering.Answering):
        def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
            raise ValueError("HIV positive")

    failing = Failing(tmp_path / "home", "fr", said.append)
    assert failing.answer(told, _asking("train")) == ({"error": f"ValueError: {answering.OWN}"}, b"")
    assert said[2] == "a request failed: ValueError: HIV positive"


def _asking(kind: str) -> bytes:
    content: bytes = save({}, metadata={"legolm": json.dumps({"kind": kind})})
    return content


def _timeless(reply: bytes) -> bytes:
    """Without the header, which has times."""
    return reply[8 + int.from_bytes(reply[:8], "little") :]


def test_frames(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen(path) as listener:
        assert Path(path).stat().st_mode & 0o777 == 0o600
        threading.Thread(target=lambda: Link(listener.accept()[0]).send({"a": "é"}, b"x" * 3_000_000)).start()
        with connect(path) as link:
            assert link.receive() == ({"a": "é"}, b"x" * 3_000_000)
    here, there = socket.socketpair()
    there.sendall(b"\xff" * 16)
    with pytest.raises(OSError, match="too large"):
        Link(here).receive()
    there.close()
    with pytest.raises(OSError, match="gone"):
        Link(here).receive()
    here.close()
