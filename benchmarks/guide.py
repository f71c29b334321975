"""Does the guide lead to a federation? Follow it word for word, each of its hosts in a network namespace of its own.

    python benchmarks/guide.py --out FOLDER

Reads the section "A server and two devices" of docs/deployment.md. Each block of code is run by bash as it stands
there, in the folder and the network of the host that its paragraph names in bold; a config is written as the file that
the paragraph names. Each device has a link to the server only. The rows of the devices are made here, and `scp` is a
stand-in that copies from one host's folder to another's. Needs Linux, root, and `ip` (iproute2).

Then it looks whether the run ended, its report is there, both devices trained in each round, and no device
reaches the other. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from legolm.report import read_status

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
TITLE = "A server and two devices"
SERVER, DEVICES = "fl.example.org", ("clinic-a", "clinic-b")
HOSTS = {"server": (SERVER,), "each device": DEVICES}
"""By the words of the guide."""
STAYS = ("legolm run", "legolm client")
"""What does not end before the next step."""
PAUSE_S, PATIENCE_S = 15.0, 900.0
"""Before a person takes the next step beside it; for a step to end."""
RUN, ROWS = "runs/first", "my.jsonl"
"""Of the guide."""
SCP = """#!/bin/sh
cp "$HOSTS/${1%%:*}/${1#*:}" "$2"
"""
PROBE = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8000), 3).close()
except ConnectionRefusedError:
    pass  # by the other host
except OSError:
    sys.exit(1)
"""


@dataclass(frozen=True)
class Step:
    """A block of the guide: what to run in a shell of each of the hosts, or to write there as `file`."""

    hosts: tuple[str, ...]
    content: str
    file: str | None = None

    @property
    def stays(self) -> bool:
        """Whether the next step comes while it runs."""
        return self.file is None and self.content.startswith(STAYS)


def steps(page: str) -> list[Step]:
    """All blocks of the section, in order. Raises `ValueError` where the paragraph before one does not say where."""
    section = page.partition(f"\n## {TITLE}\n")[2].partition("\n## ")[0]
    found = []
    block = r"((?:^[^\n]+\n)+)\n```(\w*)\n(.*?)^```$"  # its paragraph, language and content
    for told, language, content in re.findall(block, section, re.DOTALL | re.MULTILINE):
        where = re.match(r"\*\*On (?:the )?(.+?)\*\*", told)
        if where is None or where[1] not in HOSTS:
            raise ValueError(f"{told!r}: says not on which of {', '.join(HOSTS)}")
        file = re.search(r" as `([\w.]+)`", told) if language else None
        if language and file is None:
            raise ValueError(f"{told!r}: says not as which file")
        found.append(Step(HOSTS[where[1]], content, file[1] if file else None))
    return found


class Host:
    """A folder and a network namespace in which it has `address`, and finds others by name: `known`, addresses."""

    def __init__(self, name: str, folder: Path, address: str, known: Mapping[str, str]) -> None:
        self.name, self.address, self.known = name, address, known
        self.folder, self.log, self.space = folder / name, folder / f"{name}.log", f"{name}-{os.getpid()}"
        self.folder.mkdir(parents=True)
        self._names = folder / f"{name}.hosts"
        lines = {"localhost": "127.0.0.1"} | dict(known)
        self._names.write_text("".join(f"{address} {name}\n" for name, address in lines.items()))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A command there; what it says is added to its log."""
        inside = 'mount --bind "$0" /etc/hosts && exec "$@"'  # for this process only
        words = ["ip", "netns", "exec", self.space, "sh", "-c", inside, str(self._names), *command]
        hosts = self.folder.parent
        path = f"{hosts / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        with self.log.open("ab") as log:
            environment = os.environ | {"PATH": path, "HOSTS": str(hosts)}
            return subprocess.Popen(words, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until it ends. Raises `SystemExit` with what was said where it failed."""
        if process.wait(PATIENCE_S):
            raise SystemExit(f"{self.name}: {self.log.read_text()[-2000:]}")

    def reaches(self, address: str) -> bool:
        """Whether the host at this address answers, be it that nobody listens there."""
        return self.start(sys.executable, "-c", PROBE, address).wait() == 0


def ip(*words: str) -> None:
    """Of iproute2. Raises `SystemExit` where it is not there or may not."""
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise SystemExit(f"ip {' '.join(words)}: {said}; network namespaces need Linux, root and iproute2") from None


@contextmanager
def network(folder: Path) -> Iterator[dict[str, Host]]:
    """The server with a link to each device, which has a route to everywhere through it; it passes nothing on."""
    server, made = Host(SERVER, folder, "127.0.0.1", {}), list[Host]()
    try:
        for place, name in enumerate((SERVER, *DEVICES)):
            here, there = f"10.203.{place}.2", f"10.203.{place}.1"
            host = Host(name, folder, here, {SERVER: there}) if place else server
            ip("netns", "add", host.space)
            made.append(host)
            ip("-n", host.space, "link", "set", "lo", "up")
            if place:
                link = f"device{place}"
                ip("-n", server.space, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", host.space)
                for space, end, address in ((server.space, link, there), (host.space, "eth0", here)):
                    ip("-n", space, "addr", "add", f"{address}/30", "dev", end)
                    ip("-n", space, "link", "set", end, "up")
                ip("-n", host.space, "route", "add", "default", "via", there)
        yield {host.name: host for host in made}
    finally:
        for host in made:
            ip("netns", "del", host.space)


def follow(guide: Sequence[Step], hosts: Mapping[str, Host]) -> None:
    """Do the steps, and wait for the server's run. Raises `SystemExit` with what was said where one fails."""
    staying = list[tuple[Host, subprocess.Popen[bytes]]]()
    try:
        for step in guide:
            for host in (hosts[name] for name in step.hosts):
                if step.file is not None:
                    (host.folder / step.file).write_text(step.content)
                    continue
                process = host.start("bash", "-ec", step.content)
                if step.stays:
                    staying.append((host, process))
                else:
                    host.wait(process)
            if step.stays:
                time.sleep(PAUSE_S)
        for host, process in staying:
            if host.name == SERVER:
                host.wait(process)
    finally:
        for _, process in staying:
            process.terminate()
        for _, process in staying:
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out.resolve()
    guide = steps(PAGE.read_text())
    with network(folder) as hosts:
        (folder / "bin").mkdir()
        (folder / "bin" / "scp").write_text(SCP)
        (folder / "bin" / "scp").chmod(0o755)
        for name in DEVICES:
            rows = [
                {"instruction": f"Write day {day} in French.", "output": f"le {day} {name[-1]}"} for day in range(60)
            ]
            (hosts[name].folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        began = time.monotonic()
        follow(guide, hosts)
        seconds = time.monotonic() - began
        reached = [
            f"{one} to {other}"
            for one, other in permutations(hosts, 2)
            if hosts[one].reaches(hosts[one].known.get(other, hosts[other].address))
        ]
    status = read_status(folder / SERVER / RUN)
    found = {
        "steps": len(guide),
        "finished": status["finished"],
        "rounds": status["rounds_done"],
        "report": (folder / SERVER / RUN / "report.html").is_file(),
        "updates": {name: one["updates"] for name, one in status["clients"].items()},
        "trained": {name: hosts[name].log.read_text().count("train: answered") for name in DEVICES},
        "reached": reached,
        "seconds": round(seconds),
    }
    print(json.dumps(found))
    links = {way for name in DEVICES for way in (f"{SERVER} to {name}", f"{name} to {SERVER}")}
    times = dict.fromkeys(DEVICES, status["rounds"])
    whole = found["finished"] and found["report"] and found["updates"] == times and found["trained"] == times
    if not whole or set(reached) != links:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
