"""Faults of a federation of three devices, one a round, each told apart; what `deployment.py` tries.

A fault strikes at a moment that legolm's own calls reach (`deployment_hooks.py`), and what struck is made good where a
user would: a process of legolm's that was killed is started again (Flower's are legolm's to start), a full disk gets
room, a stopped machine comes back. The round must end, with the adapter of the local engine's round.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from thousand_clients import make_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "federate"))

from devices import Devices, until  # noqa: E402 (of the tests)

NAMES = ("fr", "de", "es")
ROUND_S, MOMENT_S = 1200.0, 900.0
DISK = "24m"
PUSH = b"/v1/fleet/push-messages"
PROCESSES = {
    "SuperLink": "bridge.guard",
    "SuperExec": "flower-superexec",
    "ServerApp": "flwr-serverapp",
    "SuperNode": "bridge.node",
    "ClientApp": "multiprocessing.forkserver",
}
"""What each is called in its command; those of a device are its client's children."""
AT_DEVICE = ("SuperNode", "ClientApp", "legolm client")


@dataclass(frozen=True)
class Fault:
    """What happens to whom (`client`) at which moment, for how many seconds; `drops` its reply of the round."""

    kind: str
    what: str
    moment: str
    seconds: float = 0.0
    client: str = "fr"
    drops: bool = False

    @property
    def name(self) -> str:
        """Of the log."""
        return f"{self.kind} {self.what} {self.moment}" + (f" {self.seconds:g} s" if self.seconds else "")


SERVER_MOMENTS = ("sending", "waiting", "receiving", "aggregating", "writing")
DEVICE_MOMENTS = ("asked", "training", "answered")
AWAITED = "fr"
"""Who trains while the server waits."""


def faults() -> list[Fault]:
    """All, the most telling first."""
    kills = [
        *(Fault("kill", one, at) for at in SERVER_MOMENTS for one in ("SuperLink", "ServerApp", "legolm run")),
        *(Fault("kill", one, at, client="de") for at in DEVICE_MOMENTS for one in AT_DEVICE),
        *(
            Fault("kill", one, at, client="es")
            for at in ("waiting", "writing")
            for one in ("SuperNode", "legolm client")
        ),
        *(Fault("kill", "SuperExec", at) for at in ("sending", "training", "receiving", "writing")),
        *(Fault("kill", one, "training") for one in ("SuperLink", "ServerApp", "legolm run")),
    ]
    others = [
        Fault("disk full", "device", "training", 15),
        Fault("disk full", "device", "answered", 15),
        Fault("disk full", "server", "receiving"),
        Fault("disk full", "server", "storing"),
        Fault("away", "device", "training", 10, "de"),
        Fault("away", "server", "waiting", 10),
        Fault("away", "network", "training", 10),
        Fault("reply", "twice", "answered", client="es"),
        Fault("clock", "device 1 h ahead", "training", 40, "es"),
        Fault("away", "device", "training", 70, "es"),
        Fault("away", "server", "waiting", 70),
        Fault("away", "network", "answered", 70),
        Fault("clock", "device 1 h behind", "asked", 40, "de"),
        Fault("clock", "server 1 h ahead", "waiting", 40),
        Fault("away", "SuperLink", "waiting", 70),
        Fault("away", "device", "answered", 300, "de"),
    ]
    dropped = [
        Fault("reply", "late", "answered", client="de", drops=True),
        Fault("reply", "truncated", "answered", client="es", drops=True),
        Fault("reply", "another run's", "answered", client="fr", drops=True),
        Fault("reply", "noise", "answered", client="de", drops=True),
    ]
    mixed = [one for pair in zip(kills[: len(others)], others, strict=False) for one in pair]
    return [*mixed, *kills[len(others) :], *others[len(kills) :], *dropped]


class Federation:
    """One run with a fault a round, in a folder; `compare` tells whether a round is as the local engine's."""

    def __init__(self, folder: Path, planned: Sequence[Fault], rounds: int | None = None) -> None:
        self.folder, self.planned, self.out = folder, list(planned), folder / "out"
        self._rounds = len(self.planned) if rounds is None else rounds
        folder.mkdir(parents=True)
        self._disks: list[Path] = []
        self._server: subprocess.Popen[bytes] | None = None
        for one in self.planned:
            if one.kind == "disk full":
                self._mount(self.out if one.what == "server" else folder / "devices" / one.client)
        make_model(folder / "model")
        (folder / "data").mkdir()
        for name in NAMES:
            rows = [{"instruction": f"Say {i}", "output": f"{name[i % 2]}{name}"} for i in range(20)]
            (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.hooks(name).mkdir()
            (self.hooks(name) / "clock").write_bytes(struct.pack("l", 0))
        self.hooks("server").mkdir()
        (self.hooks("server") / "clock").write_bytes(struct.pack("l", 0))
        (folder / "corpus.txt").write_text("It says what it said before. " * 200)
        self.devices = Devices(folder, NAMES, self._command, self._environment)

    def hooks(self, name: str) -> Path:
        """Where a process says at which moment it is, and waits."""
        return self.folder / f"hooks-{name}"

    def _command(self, name: str) -> list[str]:
        return [sys.executable, str(HERE / "deployment_hooks.py"), str(self.hooks(name))]

    def _environment(self, name: str) -> dict[str, str]:
        clock = self.folder.parent / "clock.so"
        found = {"LEGOLM_CLOCK": str(self.hooks(name) / "clock"), "OMP_NUM_THREADS": "1"}
        return found | ({"LD_PRELOAD": str(clock)} if clock.exists() else {})

    def config(self, engine: str) -> dict[str, Any]:
        """Of the run, or of the same in one process."""
        folder = self.folder
        text = {"text": str(folder / "corpus.txt"), "samples": 2, "length": 64}
        drops = any(one.drops for one in self.planned)
        raw: dict[str, Any] = {
            "model": str(folder / "model"),
            "precision": "fp32",
            "data": {"limit_test": 3, "limit_validation": 2},
            "blocks": [
                {"name": "dense", "method": "dense"},
                {"name": "wide", "method": "structured", "intermediate_size": 64, "calibration": text},
                {"name": "half", "method": "structured", "intermediate_size": 48, "calibration": text},
            ],
            "clients": [{"id": id, "block": block} for id, block in zip(NAMES, ("wide", "half", "dense"), strict=True)],
            "lora": {"rank": 4},
            "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
            # What is lost of a change is kept at its device: whoever trained twice would end elsewhere.
            "federation": {"engine": engine, "rounds": self._rounds, "codec": "int8"},
            "evaluate": {"scores": "own", "local_only": False, "every": 1000},
        }
        if engine == "local":
            raw["data"]["train"] = f"{folder}/data/*.jsonl"
        else:
            superlink = {"home": str(self.devices.home), "host": "127.0.0.1", "port": self.devices.port}
            raw["federation"] |= {"superlink": superlink, **({"deadline_s": 60.0} if drops else {})}
        return raw

    # The server's process.

    def start_server(self) -> None:
        """`legolm run`, going on with what is there."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.config("deployment")))
        command = [*self._command("server"), "run", str(path), "--out", str(self.out), "--resume"]
        environment = {**os.environ, **self._environment("server")}
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def server(self) -> subprocess.Popen[bytes]:
        """As it was started last."""
        assert self._server is not None
        return self._server

    def tree(self, pid: int, word: str = "") -> list[psutil.Process]:
        """A process and its descendants, or those of them with the word in their command."""
        try:
            process = psutil.Process(pid)
            found = [process, *process.children(recursive=True)]
        except psutil.Error:
            return []
        return [one for one in found if not word or word in _words(one)]

    def fill(self, place: Path) -> None:
        """Take all room on its disk."""
        with (place / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"\0" * size)

    def _mount(self, place: Path) -> None:
        """A small disk of its own."""
        if place in self._disks:
            return
        place.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=True)
        self._disks.append(place)

    # Moments.

    def moments(self, name: str) -> list[tuple[str, int]]:
        """What a process has reached."""
        path = self.hooks(name) / "moments.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(found["moment"], found["round"]) for found in map(json.loads, lines)]

    def rounds_done(self) -> int:
        """Finished ones, of which the last is there."""
        from legolm.runs import RunDir

        return RunDir(self.out).rounds_done() if self.out.exists() else 0

    def holds(self) -> dict[int, tuple[str, str]]:
        """Who waits at which moment, by round."""
        found = {}
        for number, one in enumerate(self.planned, 1):
            if one.moment == "waiting":
                found[number] = (AWAITED, "training")
            else:
                found[number] = (one.client if one.moment in DEVICE_MOMENTS else "server", one.moment)
        return found

    def close(self) -> None:
        """End all."""
        if self._server is not None:
            self._server.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(60)
            self._server.kill()
        self.devices.stop(120)
        for disk in self._disks:
            subprocess.run(["umount", "-l", str(disk)], check=False)


@dataclass
class Tried:
    """What came of a fault: for the log, and the sums."""

    fault: str
    survived: bool
    wrong: bool
    trained_twice: int
    lost: int
    seconds: float
    said: list[str]


def reference(federation: Federation) -> Path:
    """The same run in this process, without the replies that the faults drop; its folder."""
    from legolm import pipeline
    from legolm.config import RunConfig, validate
    from legolm.federate.transport import Exchange, Reply, Request, run_local
    from legolm.federate.transport.engine import Body
    from legolm.federate.wire import TrainRequest, kind_of, unpack
    from legolm.runs import RunDir

    dropped = {(number, one.client) for number, one in enumerate(federation.planned, 1) if one.drops}

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def without(exchange: Exchange) -> Exchange:
            def send(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked: list[tuple[int, str]] = []

                def noted() -> Iterator[Request]:
                    for one in requests:
                        train = unpack(one.content, TrainRequest)[0] if kind_of(one.content) == "train" else None
                        asked.append((-1 if train is None else train.round, one.client))
                        yield one

                for reply in exchange(noted(), deadline_s):
                    yield Reply(reply.index, error="dropped") if asked[reply.index] in dropped else reply

            return send

        run_local(run, config, actors, lambda exchange: body(without(exchange)))

    out = federation.folder / "local"
    pipeline.run(validate(RunConfig, federation.config("local"), "benchmark"), out, engine=engine, models=False)
    return out


def same(out: Path, wanted: Path, number: int) -> bool:
    """Whether a round's global adapter is the local engine's."""
    import torch
    from safetensors.torch import load_file

    from legolm.runs import RunDir

    ours, theirs = (load_file(RunDir(one).round(number) / "adapter.safetensors") for one in (out, wanted))
    close = (torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-7) for key in ours)
    return ours.keys() == theirs.keys() and all(close)


def campaign(federation: Federation, wanted: Path, log: Callable[[Tried], None]) -> int:
    """Try the planned faults, one a round; how many were tried until one was not survived. `wanted` is `reference`."""
    for number, (name, moment) in federation.holds().items():
        (federation.hooks(name) / f"hold-{moment}-{number}").touch()
    federation.start_server()
    federation.devices.start(*NAMES)
    for number, fault in enumerate(federation.planned, 1):
        began, places = time.monotonic(), _ends(federation)
        survived, broke = True, ""
        try:
            _strike(federation, number, fault)
            until(lambda n=number: _went_on(federation, n), ROUND_S)  # type: ignore[misc]
        except (AssertionError, OSError) as error:
            survived, broke = False, f"{type(error).__name__}: {error}"
        trained, lost, wrong = 0, 0, False
        if survived:
            wrong = not same(federation.out, wanted, number)
            accepted = _record(federation.out, number)["accepted"]
            for name in NAMES:
                times = federation.moments(name).count(("trained", number))
                trained += max(times - 1, 0)
                lost += times > 0 and name not in accepted and not (fault.drops and name == fault.client)
        said = [*([broke] if broke else []), *_said(federation, places)]
        log(Tried(fault.name, survived, wrong, trained, lost, round(time.monotonic() - began, 1), said))
        if not survived:
            return number
    return len(federation.planned)


def _went_on(federation: Federation, number: int) -> bool:
    return _run(federation) and federation.rounds_done() >= number


def _run(federation: Federation) -> bool:
    """Raises `AssertionError` where a process of legolm's is gone that nobody ended."""
    for name in NAMES:
        if not federation.devices.alive(name):
            raise AssertionError(f"legolm client of {name} ended")
    if federation.server().poll() not in (None, 0):
        raise AssertionError(f"legolm run ended with {federation.server().returncode}")
    return True


def _strike(federation: Federation, number: int, fault: Fault) -> None:
    """Wait for the moment, let it happen, and make good what a user makes good."""
    name, moment = federation.holds()[number]
    until(lambda: _run(federation) and (moment, number) in federation.moments(name), MOMENT_S, 0.1)
    if fault.moment == "waiting":  # the others have answered, and the server has it
        others = [one for one in NAMES if one != AWAITED]
        until(lambda: all(("answered", number) in federation.moments(one) for one in others), MOMENT_S)
        time.sleep(8)
    hold = federation.hooks(name) / f"hold-{moment}-{number}"

    def go_on() -> None:
        hold.unlink(missing_ok=True)

    {"kill": _kill, "away": _away, "disk full": _disk, "clock": _clock, "reply": _reply}[fault.kind](
        federation, number, fault, go_on
    )
    go_on()


GoOn = Callable[[], None]


def _kill(federation: Federation, number: int, fault: Fault, go_on: GoOn) -> None:
    devices, server = federation.devices, federation.server()
    if fault.what == "legolm run":
        server.kill()
        server.wait()
        go_on()
        federation.start_server()
    elif fault.what == "legolm client":
        devices.kill(fault.client)
        go_on()
        devices.start(fault.client)
    else:
        pid = devices.pid(fault.client) if fault.what in AT_DEVICE else server.pid
        found = federation.tree(pid, PROCESSES[fault.what])
        if not found:
            raise AssertionError(f"there was no {fault.what} at that moment")
        for one in found:
            with suppress(psutil.Error):
                one.kill()


def _away(federation: Federation, number: int, fault: Fault, go_on: GoOn) -> None:
    if fault.what == "network":
        federation.devices.tap.cut(fault.seconds)
        go_on()
        time.sleep(fault.seconds)
        return
    word = PROCESSES.get(fault.what, "")
    pid = federation.devices.pid(fault.client) if fault.what == "device" else federation.server().pid
    found = federation.tree(pid, word)
    for one in found:
        one.suspend()
    if fault.what != "device":
        go_on()
    time.sleep(fault.seconds)
    for one in found:
        with suppress(psutil.Error):
            one.resume()


def _disk(federation: Federation, number: int, fault: Fault, go_on: GoOn) -> None:
    if fault.what == "device":
        place = federation.devices.device(fault.client)
        federation.fill(place)
        go_on()
        time.sleep(fault.seconds)
    else:
        place = federation.out
        federation.fill(place)
        go_on()
        with suppress(subprocess.TimeoutExpired):
            federation.server().wait(60)
    (place / "filler").unlink()
    if fault.what == "server":
        if federation.server().poll() is None:
            raise AssertionError("the server did not say that its disk is full")
        federation.start_server()


def _clock(federation: Federation, number: int, fault: Fault, go_on: GoOn) -> None:
    path = federation.hooks("server" if fault.what.startswith("server") else fault.client) / "clock"

    def set_to(seconds: int) -> None:
        with path.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("l", seconds))

    set_to(-3600 if fault.what.endswith("behind") else 3600)
    go_on()
    time.sleep(fault.seconds)
    set_to(0)


def _reply(federation: Federation, number: int, fault: Fault, go_on: GoOn) -> None:
    if fault.what == "twice":
        go_on()
        until(lambda: _went_on(federation, number), ROUND_S)
        if not federation.devices.tap.say_again(PUSH):
            raise AssertionError("no reply was seen")
    elif fault.what == "late":
        until(lambda: _went_on(federation, number), ROUND_S)
    else:
        (federation.hooks(fault.client) / f"alter-{number}").write_text(fault.what)


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _record(out: Path, number: int) -> dict[str, Any]:
    from legolm.runs import RunDir

    found: dict[str, Any] = json.loads((RunDir(out).round(number) / "metrics.json").read_text())
    return found


def _logs(federation: Federation) -> list[Path]:
    return [federation.folder / f"{name}.log" for name in ("server", *NAMES)]


def _ends(federation: Federation) -> list[int]:
    return [path.stat().st_size if path.exists() else 0 for path in _logs(federation)]


def _said(federation: Federation, places: Sequence[int]) -> list[str]:
    """What the logs say since then, without what is said each round."""
    found = []
    for path, place in zip(_logs(federation), places, strict=True):
        with path.open("rb") as file:
            file.seek(place)
            lines = file.read().decode(errors="replace").splitlines()
        found += [f"{path.stem}: {line[:200]}" for line in lines if line.strip() and "answered in" not in line]
    return found[:12]


def line_of(tried: Tried) -> str:
    """Of the log."""
    return json.dumps(asdict(tried))
