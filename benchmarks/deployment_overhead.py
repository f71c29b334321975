"""What rounds over devices of their own cost beside those of Flower's own no-op app; what `deployment.py` measures.

In turns: a run of legolm, then as many rounds of an app that only passes bytes back and forth, as many as legolm's
messages have, by Flower's `send_and_receive`. The same devices, nodes, kind of SuperLink, TLS and keys.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

from deployment_faults import NAMES, ROUND_S, Federation

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "federate"))

from devices import until  # noqa: E402 (of the tests)

LOOK_S = 1.0
SERVER = """
import json, time
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    given = context.run_config
    while len(list(grid.get_node_ids())) < given["nodes"]:
        time.sleep(0.5)
    for number in range(given["rounds"]):
        began = time.time()
        content = RecordDict({"content": ConfigRecord({"bytes": bytes(given["down"]), "up": given["up"]})})
        messages = [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]
        count = len(list(grid.send_and_receive(messages)))
        with open(given["times"], "a") as file:
            file.write(json.dumps([time.time() - began, count]) + "\\n")
"""
CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def answer(message, context):
    record = ConfigRecord({"bytes": bytes(message.content["content"]["up"])})
    return Message(RecordDict({"content": record}), reply_to=message)
"""


class Watch:
    """Peaks of the resident memory (MB) of the server's processes, and of a device's while it has nothing to do."""

    def __init__(self, federation: Federation) -> None:
        self.server, self.nodes, self.clients = 0.0, list[float](), list[float]()
        self._federation, self._ended = federation, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more looking."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.server = max(self.server, sum(map(_rss, self._federation.tree(self._federation.server().pid))))
            for name in NAMES:
                tree = self._federation.tree(self._federation.devices.pid(name))
                if len(tree) > 1 and not any("flwr-clientapp" in _words(one) for one in tree):
                    self.nodes.append(sum(map(_rss, tree[1:])))
                    self.clients.append(_rss(tree[0]))


def overhead(folder: Path, rounds: int, turns: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Medians of the rounds' seconds, ratios of the turns, bytes of a round and memory."""
    federation = Federation(folder, [], rounds)
    ours, plain = list[float](), list[float]()
    try:
        federation.devices.start(*NAMES)
        for turn in range(turns):
            federation.out = folder / f"out-{turn}"
            passed = _passed(federation)
            federation.start_server()
            watch = Watch(federation)
            until(lambda: federation.server().poll() is not None, ROUND_S * rounds, LOOK_S)
            watch.stop()
            records = [json.loads(line) for line in (federation.out / "metrics.jsonl").read_text().splitlines()]
            trained = [one for one in records if one.get("round", 0) > 1 and one.get("validation") is None]
            ours.append(median(one["seconds"] for one in trained))
            traffic = [one["bytes"][name] for one in trained for name in NAMES]
            each = (_passed(federation) - passed) / rounds
            down, up = (round(fmean(one[way] for one in traffic)) for way in ("down", "up"))
            plain.append(median(_no_op(federation, rounds, down, up, folder / f"times-{turn}")[1:]))
            note(f"turn {turn}: legolm {ours[-1]:.2f} s a round, Flower's no-op {plain[-1]:.2f} s")
    finally:
        federation.close()
    return {
        "round_overhead_ratio": round(fmean(one / two for one, two in zip(ours, plain, strict=True)), 3),
        "round_s": [round(one, 2) for one in ours],
        "no_op_round_s": [round(one, 2) for one in plain],
        "bytes_per_round": round(each),
        "payload_bytes_per_round": len(NAMES) * (down + up),
        "server_rss_mb": round(watch.server, 1),
        "device_rss_mb": round(median(watch.nodes), 1),
        "device_client_rss_mb": round(median(watch.clients), 1),
    }


def _no_op(federation: Federation, rounds: int, down: int, up: int, times: Path) -> list[float]:
    """Seconds of each round of Flower's own app."""
    from legolm.config import SuperLinkConfig
    from legolm.federate.transport.superlink import PYPROJECT, Flower

    given = {"nodes": len(NAMES), "rounds": rounds, "down": down, "up": up, "times": str(times)}

    class Plain(Flower):
        """The same SuperLink with another app."""

        def _write_app(self) -> None:
            super()._write_app()
            app, lines = self._folder / "app", [f"{key} = {json.dumps(value)}" for key, value in given.items()]
            head = PYPROJECT.partition("[tool.flwr.app.config]")[0]
            (app / "pyproject.toml").write_text(f"{head}[tool.flwr.app.config]\n" + "\n".join(lines) + "\n")
            (app / "legolm_app" / "server_app.py").write_text(SERVER)
            (app / "legolm_app" / "client_app.py").write_text(CLIENT)

        def _run_config(self) -> list[str]:
            return []

    home, port = str(federation.devices.home), federation.devices.port
    settings = SuperLinkConfig(home=home, host="127.0.0.1", port=port)
    with Plain(times.with_suffix(".flower"), times.parent, settings, print) as flower:
        end = time.monotonic() + ROUND_S * rounds
        while not times.exists() or len(times.read_text().splitlines()) < rounds:
            if time.monotonic() > end:
                raise AssertionError("Flower's app did not end")
            flower.wait(LOOK_S)
    found = [json.loads(line) for line in times.read_text().splitlines()]
    assert all(count == len(NAMES) for _, count in found), "Flower's app lost replies"
    return [seconds for seconds, _ in found]


def _passed(federation: Federation) -> int:
    return sum(map(len, [*federation.devices.tap.up, *federation.devices.tap.down]))


def _rss(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
