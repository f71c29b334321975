"""What does a federation on devices of their own cost, and what does it survive? TLS, a SuperLink, three devices.

    python benchmarks/deployment.py --out FOLDER [--faults N] [--workers 2] [--rounds N]

Everything is on this machine: a random model of 2 layers, three blocks, int8 changes with error feedback.

- *Overhead*: rounds of legolm beside rounds of Flower's own no-op app, in turns: as many nodes, the bytes of legolm's
  messages, TLS and keys (`deployment_overhead.py`). `bytes_per_round` is all that passes, both ways, in the open.
- *Faults*, one a round, each told apart (`deployment_faults.py`): FOLDER/faults.jsonl has a line for each, and the same
  command goes on behind the last. Disks are full where this may mount (root), clocks are wrong where a compiler is.

Last line: one JSON object. `wrong_results` counts rounds whose global adapter is not the local engine's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployment_faults import Fault, Federation, Tried, campaign, faults, line_of, reference
from deployment_overhead import overhead

EACH = 14
"""Faults of one federation."""


def read(log: Path) -> list[dict[str, Any]]:
    """Of an earlier call."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def possible() -> list[Fault]:
    """Those that this machine lets happen."""
    found = faults()
    with tempfile.TemporaryDirectory() as place:
        probe = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True)
        if probe.returncode == 0:
            subprocess.run(["umount", place], check=True)
        else:
            found = [one for one in found if one.kind != "disk full"]
    return found if shutil.which("cc") else [one for one in found if one.kind != "clock"]


def try_faults(out: Path, wanted: Sequence[Fault], workers: int) -> None:
    """One federation after the other, several at once."""
    log, lock = out / "faults.jsonl", threading.Lock()
    if shutil.which("cc"):
        source = Path(__file__).with_name("deployment_clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(out / "clock.so"), str(source), "-ldl"], check=True)

    def keep(tried: Tried) -> None:
        with lock, log.open("a") as lines:
            lines.write(line_of(tried) + "\n")
        print(f"{tried.fault}: {'survived' if tried.survived else 'LOST'} {tried.seconds} s", flush=True)

    def attempt(number: int, planned: Sequence[Fault]) -> None:
        while planned:
            folder = out / f"federation-{number}"
            while folder.exists():
                folder = folder.with_name(f"{folder.name}x")
            with lock:
                federation = Federation(folder, planned)
                wanted = reference(federation)
            try:
                planned = planned[campaign(federation, wanted, keep) :]
            finally:
                federation.close()

    importlib.import_module("legolm.pipeline")  # before threads: importing is not for several at once
    known = {one["fault"] for one in read(log)}
    left = [one for one in wanted if one.name not in known]
    plain, drops = ([one for one in left if one.drops is how] for how in (False, True))
    groups = [plain[at : at + EACH] for at in range(0, len(plain), EACH)] + ([drops] if drops else [])
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(attempt, number, group) for number, group in enumerate(groups)]:
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="of each turn; 0 leaves the overhead out")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.rounds and not (out / "overhead.json").exists():
        measured = overhead(out / "overhead", options.rounds, options.turns, print)
        (out / "overhead.json").write_text(json.dumps(measured))
    try_faults(out, possible()[: options.faults], options.workers)
    tried = read(out / "faults.jsonl")
    found = (json.loads((out / "overhead.json").read_text()) if (out / "overhead.json").exists() else {}) | {
        "faults_tried": len(tried),
        "faults_survived": sum(one["survived"] for one in tried),
        "trained_twice": sum(one["trained_twice"] for one in tried),
        "lost": sum(one["lost"] for one in tried),
        "wrong_results": sum(one["wrong"] for one in tried),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
