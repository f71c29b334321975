"""Asking devices until they answer: what Flower loses is asked again, and what came once is asked of nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from legolm import config as configs
from legolm.config import RunConfig
from legolm.federate.transport import Reply, Request, deployment
from legolm.federate.transport.deployment import Asking, those
from legolm.federate.transport.superlink import LostError
from legolm.federate.wire import EvaluateRequest, pack, read_welcome
from legolm.runs import RunDir, read_live

NAMES = ("fr", "de", "es")
Answer = dict[str, Any] | bytes | None
"""What a message ends with: a header, a reply, or nothing at all."""


class Flower:
    """A SuperLink whose devices do what `answers` says of the (client, number of the message to it)."""

    def __init__(self, answers: Callable[[str, int], Answer], online: Callable[[int], Sequence[str]]) -> None:
        self._answers, self._online = answers, online
        self.turn, self.asked, self._sent = 0, list[tuple[str, bytes, str]](), dict[str, tuple[str, int]]()
        self.since = dict.fromkeys((*NAMES, "strange"), "0")
        self.lost = -1

    def ready(self) -> bool:
        self.turn += 1
        return True

    def nodes(self) -> dict[str, tuple[str, str]]:
        return {name: (name, self.since[name]) for name in self._online(self.turn)}

    def push(self, node: str, welcome: str, request: bytes, left_s: float | None) -> str | None:
        self.left_s = left_s
        number = sum(one == node for one, _, _ in self.asked)
        self.asked.append((node, request, welcome))
        self._sent[str(len(self.asked))] = node, number
        return str(len(self.asked))

    def pull(self, ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        if self.turn == self.lost:
            self._sent.clear()
            raise LostError
        found: list[tuple[dict[str, Any], bytes]] = []
        for id in [id for id in ids if id in self._sent]:
            answer = self._answers(*self._sent.pop(id))
            if answer is not None:
                found.append(({"id": id}, answer) if isinstance(answer, bytes) else ({"id": id, **answer}, b""))
        return found

    def wait(self, seconds: float) -> None:
        return


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Reply], list[str]]]:
    """One exchange of one request for each client; the replies, and what was noted."""
    for name in ("AGAIN_S", "NODES_S"):
        monkeypatch.setattr(deployment, name, 0.0)
    monkeypatch.setattr(deployment, "AWAY_S", 0.01)
    (tmp_path / "blocks" / "a").mkdir(parents=True)
    (tmp_path / "blocks" / "a" / "config.json").write_text("{}")
    federation: dict[str, Any] = {"engine": "deployment", "deadline_s": 0.2}
    raw: dict[str, Any] = {"blocks": [{"name": "a", "method": "dense"}], "evaluate": {"scores": "own"}}
    raw |= {"clients": [{"id": name, "block": "a"} for name in NAMES], "federation": federation}
    config = configs.validate(RunConfig, raw, "test")

    def request(client: str) -> Request:
        envelope = {"run": "0" * 16, "client": client, "block": "a", "base_fingerprint": "", "coverage_hash": ""}
        header = EvaluateRequest(
            **envelope, rank=1, scale=1.0, sets=[], targets=None, ranks={}, max_length=8, long_examples="truncate",
            precision="fp32", batch_size=1,
        )  # fmt: skip
        return Request(client, pack(header, {}))

    def run(flower: Flower, deadline_s: float | None = None, first: int | None = None) -> tuple[list[Reply], list[str]]:
        said: list[str] = []
        asking = Asking(those(RunDir(tmp_path), config), flower, said.append)  # type: ignore[arg-type]
        if first is None:
            return list(asking.exchange(map(request, NAMES), deadline_s)), said
        with closing(asking.exchange(map(request, NAMES), deadline_s)) as replies:
            found = [next(replies) for _ in range(first)]
        return found + list(asking.exchange([request("es")], deadline_s)), said

    return run


def everyone(turn: int) -> Sequence[str]:
    return NAMES


def found(replies: list[Reply]) -> dict[str, bytes | str]:
    return {NAMES[one.index]: one.content or one.error for one in replies}


def test_what_is_of_the_way_is_asked_again_and_what_is_of_the_request_is_not(ask: Any, tmp_path: Path) -> None:
    def answers(client: str, number: int) -> Answer:
        first: dict[str, list[Answer]] = {
            "fr": [{"code": 5, "error": "Node Unavailable"}, {"again": "busy"}, {"code": 8, "error": "crashed"}],
            "de": [{"error": "Traceback:\nno such block"}],
            "es": [{}],
        }
        return first[client][number] if number < len(first[client]) else client.encode()

    flower = Flower(answers, everyone)
    replies, said = ask(flower)
    assert found(replies) == {"fr": b"fr", "de": "no such block", "es": "its message has no reply in it"}
    assert [node for node, _, _ in flower.asked].count("fr") == 4 and len({one for _, one, _ in flower.asked}) == 3
    assert [line for line in said if "fr" in line] == [
        f"device fr: {why}; it is asked again" for why in ("Node Unavailable", "busy", "crashed")
    ]
    # Who answered is asked no more, in this process or another.
    again = Flower(lambda client, number: b"other", everyone)
    assert found(ask(again)[0])["fr"] == b"fr" and {node for node, _, _ in again.asked} == {"de", "es"}
    welcome = read_welcome(flower.asked[0][2])
    assert (welcome.client, welcome.block, welcome.data.part) == ("fr", "a", "fr")


def test_a_lost_run_and_a_node_that_began_anew_lose_nothing(ask: Any) -> None:
    def answers(client: str, number: int) -> Answer:
        if client == "de" and number == 1:
            flower.since["de"] = "1"  # it began anew, and Flower says nothing of what it had
            return None
        return client.encode()

    flower = Flower(answers, everyone)
    flower.lost = 1
    assert found(ask(flower)[0]) == {name: name.encode() for name in NAMES}
    asked = [node for node, _, _ in flower.asked]
    assert [asked.count(name) for name in NAMES] == [2, 3, 2]


def test_who_is_away_is_waited_for_and_named(ask: Any, tmp_path: Path) -> None:
    flower = Flower(lambda client, number: client.encode(), lambda turn: ("fr", "strange"))
    replies, said = ask(flower)
    assert found(replies)["fr"] == b"fr" and found(replies)["es"] == "late: not online for federation.deadline_s, 0.2 s"
    assert "device strange is online and no client of this run; nobody asks it" in said
    assert "device es is not online; it is asked when it comes" in said
    assert read_live(tmp_path).root["es"].state == "away"
    late = Flower(lambda client, number: None if client == "es" else client.encode(), everyone)
    assert found(ask(late, deadline_s=0.3)[0])["es"] == "late: no answer within federation.deadline_s, 0.3 s"


def test_who_is_not_waited_for_goes_on_and_is_not_asked_anew(ask: Any) -> None:
    """Two replies are enough; the third comes to who asks the same again."""
    slow: list[int] = []

    def answers(client: str, number: int) -> Answer:
        return client.encode()

    flower = Flower(answers, everyone)
    pull = flower.pull

    def late(ids: Sequence[str]) -> list[tuple[dict[str, Any], bytes]]:
        slow.append(1)
        return [one for one in pull([id for id in ids if flower.asked[int(id) - 1][0] != "es" or len(slow) > 3])]

    flower.pull = late  # type: ignore[method-assign]
    replies, _ = ask(flower, 5.0, first=2)
    assert [one.content for one in replies] == [b"fr", b"de", b"es"]
    assert [node for node, _, _ in flower.asked] == list(NAMES)
    assert flower.left_s is not None and 4 < flower.left_s <= 5
