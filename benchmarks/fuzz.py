"""Broken, absurd and hostile inputs of every kind for the readers of the product: it says what is wrong, or reads them.

    python benchmarks/fuzz.py [--inputs 20000] [--seed 0] [--workers 2] [--first 0] [--only N] [--kinds KIND ...]

Each input is a valid one (benchmarks/fuzz_inputs.py makes them) with a few parts, tokens or bytes changed; its number
and the seed decide which. A crash is anything but the product's own error (`LegolmError`, one line) or success: an
exception of Python or a library, the end of the process, over 60 s. It is printed with kind and number, and `--only N`
runs that one again and shows all of it; `--first N` goes on from there. `--kinds` tries these only. `slowest_s` is CPU
time of this process (a chat template's own process has its own limit), `largest_mb` the most by which the peak of
memory rose beyond the input's size.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

BATCH = 500
LONGEST_ERROR = 3000
HUNG_S = 60
STATUS = Path("/proc/self/status")


def memory(field: str) -> int:
    """Bytes: VmRSS, what this process holds, or VmHWM, the most since `forget_peak`."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Fuzzer:
    """Makes inputs by their number and reads them."""

    def __init__(self, seed: int, home: Path, names: Collection[str] = ()) -> None:
        from fuzz_inputs import kinds

        self._seed, self._home = seed, home
        (home / "valid").mkdir()
        self._kinds = [kind for kind in kinds(home / "valid") if not names or kind.name in names]
        self._weights = [kind.weight for kind in self._kinds]

    def one(self, number: int, show: bool = False) -> dict[str, Any]:
        """What came of input `number`."""
        from fuzz_changes import mutated
        from legolm.errors import LegolmError

        rng = random.Random(f"{self._seed}:{number}")
        kind = rng.choices(self._kinds, self._weights)[0]
        content = mutated(kind.form, rng.choice(kind.seeds), rng)
        folder = self._home / kind.name
        folder.mkdir(exist_ok=True)
        result: dict[str, Any] = {"kind": kind.name, "number": number, "outcome": "read"}
        held = memory("VmRSS")
        forget_peak()
        began = time.process_time()
        try:
            kind.read(content, folder)
        except LegolmError as error:
            result["outcome"] = "refused"
            if "\n" in str(error) or len(str(error)) > LONGEST_ERROR:
                result |= {"outcome": "crash", "error": f"an error of {len(str(error))} signs: {str(error)[:200]!r}"}
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = traceback.format_exception_only(error)[-1].strip()[:300]
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            places = [f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in frames]
            result |= {"outcome": "crash", "error": said, "at": places}
            if show:
                traceback.print_exc()
        result["seconds"] = time.process_time() - began
        result["mb"] = max(0, memory("VmHWM") - held - len(content)) / 1e6
        if show:
            print(kind.name, content[:3000], sep="\n")
        return result


def work(options: argparse.Namespace, worker: int) -> None:
    """The inputs of one worker; a line of JSON each batch. The number that it is at lies in the file `at`."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with options.at.open("r+b") as file:
        at = mmap.mmap(file.fileno(), 8)
    home = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.home))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library says is no batch
    fuzzer = Fuzzer(options.seed, home, options.kinds)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (4 << 30), resource.RLIM_INFINITY))
    found: list[dict[str, Any]] = []
    skipped = 0
    for number in range(options.first + worker, options.first + options.inputs, options.workers):
        if number in options.skip:
            skipped += 1
            continue
        at[:] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_REAL, HUNG_S)  # ends the process, also in the middle of C code
        found.append(fuzzer.one(number))
        if len(found) == BATCH:
            print(json.dumps(summed(found) | {"skipped": skipped}), file=out, flush=True)
            found, skipped = [], 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(summed(found) | {"skipped": skipped}), file=out, flush=True)


def summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a batch adds up to."""
    slowest = max(found, key=lambda one: one["seconds"], default=None)
    largest = max(found, key=lambda one: one["mb"], default=None)
    counts = Counter(f"{one['kind']}/{one['outcome']}" for one in found)
    return {
        "inputs": len(found),
        "crashes": [one for one in found if one["outcome"] == "crash"],
        "slowest": slowest,
        "largest": largest,
        "counts": counts,
        "seconds": {kind: sum(o["seconds"] for o in found if o["kind"] == kind) for kind in {o["kind"] for o in found}},
    }


class Total:
    """Of all workers."""

    def __init__(self) -> None:
        self.inputs = self.crashes = 0
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.slowest: dict[str, Any] = {"seconds": 0.0}
        self.largest: dict[str, Any] = {"mb": 0.0}
        self._said: Counter[str] = Counter()

    def add(self, batch: dict[str, Any]) -> None:
        """What `summed` made of some inputs."""
        self.inputs += batch["inputs"]
        self.counts.update(batch["counts"])
        self.seconds.update(batch["seconds"])
        self.slowest = max(self.slowest, batch["slowest"] or self.slowest, key=lambda one: float(one["seconds"]))
        self.largest = max(self.largest, batch["largest"] or self.largest, key=lambda one: float(one["mb"]))
        for crash in batch["crashes"]:
            self.crashes += 1
            place = f"{crash['kind']} {crash.get('at', [''])[-1]}"
            self._said[place] += 1
            if self._said[place] <= 3:  # the others are of its kind
                print(
                    f"crash: {crash['kind']}, input {crash['number']}: {crash['error']} {crash.get('at', '')}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="run this input alone and show what comes of it")
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--skip", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options, options.worker)
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        if options.only is not None:
            print(Fuzzer(options.seed, Path(home), options.kinds).one(options.only, show=True))
            return
        report(options, Path(home))


def report(options: argparse.Namespace, home: Path) -> None:
    began, total = time.monotonic(), Total()
    workers = [Worker(options, home, number) for number in range(options.workers)]
    told = began
    while any(worker.alive for worker in workers):
        for worker in workers:
            if worker.alive and (batch := worker.batch()):
                total.add(batch)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            rate = total.inputs / (told - began)
            print(f"{total.inputs} inputs, {total.crashes} crashes, {rate:.0f} a second", flush=True)
    names = sorted({name.partition("/")[0] for name in total.counts})
    print(f"{'kind':<20}{'read':>9}{'refused':>9}{'crash':>7}{'ms':>8}")
    for name in names:
        read, refused, crash = (total.counts[f"{name}/{outcome}"] for outcome in ("read", "refused", "crash"))
        each = 1000 * total.seconds[name] / max(1, read + refused + crash)
        print(f"{name:<20}{read:>9}{refused:>9}{crash:>7}{each:>8.2f}")
    print(f"slowest: {total.slowest}\nlargest: {total.largest}")
    kinds = {name: sum(total.counts[f"{name}/{outcome}"] for outcome in ("read", "refused", "crash")) for name in names}
    last = {"inputs": total.inputs, "crashes": total.crashes, "slowest_s": round(total.slowest["seconds"], 3)}
    last |= {"largest_mb": round(total.largest["mb"], 1), "kinds": kinds, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(last))
    sys.exit(1 if total.crashes else 0)


class Worker:
    """A process for every so manieth input, started again behind an input that ended it."""

    def __init__(self, options: argparse.Namespace, home: Path, worker: int) -> None:
        self._options, self._home, self._worker = options, home, worker
        self._at = home / f"at-{worker}"
        self._skip: list[int] = []
        self._next, self._left = options.first, options.inputs
        self.alive = True
        self._start()

    def _start(self) -> None:
        self._at.write_bytes(bytes(8))
        options = self._options
        arguments = {
            "worker": self._worker, "workers": options.workers, "at": self._at, "home": self._home,
            "first": self._next, "inputs": self._left, "seed": options.seed,
        }  # fmt: skip
        command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in arguments.items())]
        command += ["--kinds", *options.kinds, "--skip", *map(str, self._skip)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)

    def batch(self) -> dict[str, Any] | None:
        """What comes next; None at the end."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            done = self._options.workers * (found["inputs"] + found["skipped"])
            self._next, self._left = self._next + done, self._left - done
            return found
        if not self._process.wait():
            self.alive = False
            return None
        number = int.from_bytes(self._at.read_bytes(), "little")
        if number in self._skip or len(self._skip) > 100:
            sys.exit(f"fuzz: a worker ends with {self._process.returncode} again and again; see --only {number}")
        code = self._process.returncode
        self._skip.append(number)
        self._start()
        lost = {"kind": "?", "number": number, "error": f"the process ended with {code}"}
        return summed([]) | {"inputs": 1, "crashes": [lost], "counts": {"?/crash": 1}}


if __name__ == "__main__":
    main()
