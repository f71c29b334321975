"""Does a relay between two real SuperLinks change a run's result? Each server and each device is a process of its own.

    python benchmarks/relay.py --out FOLDER

On this machine, by the commands of docs/deployment.md, with TLS: a server with two clients, the device `es` and the
relay `north`, which is the server of the devices `fr` and `de`. A random model of 2 layers, two rounds. The same
three clients are asked by the local engine, with the chance that the relay gives its devices, and the last round's
adapters are compared.

Last line: one JSON object. `difference` is the largest of any entry, `size` the largest entry.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from safetensors.torch import load_file

from legolm import pipeline
from legolm.config import RunConfig, validate
from legolm.runs import RunDir
from legolm.system import derive_seed, free_port
from thousand_clients import make_model

REGION = ("fr", "de")
ROUNDS, PATIENCE_S = 2, 900.0
LEGOLM = (sys.executable, "-m", "legolm.cli")


class Processes:
    """Of legolm, in a folder, each with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, list[subprocess.Popen[bytes]]()

    def call(self, *arguments: object) -> None:
        """One that ends."""
        subprocess.run([*LEGOLM, *map(str, arguments)], cwd=self._folder, check=True)

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """One that stays."""
        with (self._folder / f"{name}.log").open("wb") as log:
            command = [*LEGOLM, *map(str, arguments)]
            self._running.append(subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log))
        return self._running[-1]

    def stop(self) -> None:
        """All that are left."""
        for one in self._running:
            one.terminate()
        for one in self._running:
            one.wait(60)


def config(folder: Path, clients: list[dict[str, Any]], port: int | None) -> dict[str, Any]:
    """Of the run behind this port, or of the same in one process."""
    data: dict[str, Any] = {"limit_test": 3, "limit_validation": 2}
    federation: dict[str, Any] = {"engine": "local", "rounds": ROUNDS}
    if port is None:
        data["train"] = f"{folder}/data/*.jsonl"
    else:
        superlink = {"home": "main", "host": "127.0.0.1", "port": port}
        federation |= {"engine": "deployment", "superlink": superlink}
    return {
        "model": str(folder / "model"),
        "precision": "fp32",
        "data": data,
        "blocks": [{"name": "a", "method": "dense"}],
        "clients": clients,
        "lora": {"rank": 4},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "aggregate": {"weight": "examples"},
        "federation": federation,
        "evaluate": {"scores": "own", "local_only": False},
    }


def deployed(folder: Path) -> float:
    """The run with its relay, by commands; its seconds."""
    port, north = free_port(), free_port()
    processes = Processes(folder)
    for home in ("main", "north"):
        processes.call("certs", "init", home, "--host", "127.0.0.1")
    for name, home in (("es", "main"), ("relay", "main"), *((one, "north") for one in REGION)):
        processes.call("certs", "client", name)
        processes.call("devices", "add", home, "north" if name == "relay" else name, f"{name}/device.pub")
    clients: list[dict[str, Any]] = [{"id": "north", "block": "a", "relay": True}, {"id": "es", "block": "a"}]
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder, clients, port)))
    began = time.monotonic()
    try:
        server = processes.start("server", "run", "run.yaml", "--out", "relayed")
        region = ("--region", "north", "--host", "127.0.0.1", "--port", north)
        main = ("--server", f"127.0.0.1:{port}", "--ca", "main/ca.pem")
        processes.start("relay", "relay", *main, "--home", "relay", *region)
        for name in ("es", *REGION):
            to = main if name == "es" else ("--server", f"127.0.0.1:{north}", "--ca", "north/ca.pem")
            processes.start(name, "client", *to, "--home", name, "--data", f"data/{name}.jsonl", "--device", "cpu")
        if server.wait(PATIENCE_S):
            raise SystemExit((folder / "server.log").read_text()[-2000:])
        return time.monotonic() - began
    finally:
        processes.stop()


def flat(folder: Path) -> None:
    """The same clients without the relay, in this process."""

    def as_relayed(seed: int, *what: object) -> int:
        stage, number, id = what
        if id in REGION:
            return derive_seed(derive_seed(seed, stage, number, "north"), id)
        return derive_seed(seed, *what)

    clients: list[dict[str, Any]] = [{"id": id, "block": "a"} for id in (*REGION, "es")]
    with patch("legolm.federate.server.dispatch.derive_seed", as_relayed):
        raw = config(folder, clients, None)
        pipeline.run(validate(RunConfig, raw, "flat"), folder / "flat", models=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out.resolve()
    (folder / "data").mkdir(parents=True)
    make_model(folder / "model")
    for name in (*REGION, "es"):
        rows = [{"instruction": f"Say {i}", "output": f"{name[i % 2]}{name}"} for i in range(20)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = deployed(folder)
    flat(folder)
    one, two = (load_file(RunDir(folder / name).round(ROUNDS) / "adapter.safetensors") for name in ("relayed", "flat"))
    assert one.keys() == two.keys()
    found = {
        "rounds": ROUNDS,
        "sums": (folder / "relay.log").read_text().count(f"the sum of {len(REGION)} of {len(REGION)} devices"),
        "restarts": (folder / "relay.log").read_text().count("started again"),
        "difference": max(float((one[key] - two[key]).abs().max()) for key in one),
        "size": max(float(tensor.abs().max()) for tensor in two.values()),
        "seconds": round(seconds),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
