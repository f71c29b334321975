"""What does a client cost the server? Runs of 50, 200 and 800 clients of a tiny model, all stages, the local engine.

    python benchmarks/overhead.py [--clients 50 200 800] [--rounds 2]

Each number of clients is a run in a fresh process with one thread: two blocks, four examples a client, one step a
client in each of the rounds, in the local stage all of them, and one personal step; without final models, which are a
checkpoint a client. The model is that of `thousand_clients.py`.

`seconds` are the server's: CPU time of this process from the config to the report, without what the clients' runtimes
took to answer, who are in this process with the local engine; `clients_s` are theirs, `wall_s` is the time of both on
the clock. What imports and making the model and the data take is left out. `rss_mb` is the process's peak. Nothing may
grow with the square of the clients: `seconds_800_over_200` is to be at most 4.4, `rss_800_over_200` at most 1.15. Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from thousand_clients import make_model

SMALL, MIDDLE, LARGE = 50, 200, 800


def measure(clients: int, rounds: int) -> dict[str, float]:
    """One run in this process."""
    import torch

    from legolm import pipeline
    from legolm.config import RunConfig, validate
    from legolm.federate.transport import Body, Exchange, Reply, Request, run_local
    from legolm.runs import RunDir

    torch.set_num_threads(1)
    asking = answering = 0.0

    def asked(requests: Iterable[Request]) -> Iterator[Request]:
        """The requests; what it takes to make them is the server's."""
        nonlocal asking
        queue = iter(requests)
        while True:
            began = time.process_time()
            request = next(queue, None)
            asking += time.process_time() - began
            if request is None:
                return
            yield request

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def watched(exchange: Exchange) -> Exchange:
            def send(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                nonlocal answering
                replies = exchange(asked(requests), deadline_s)
                while True:
                    began, before = time.process_time(), asking
                    reply = next(replies, None)
                    answering += time.process_time() - began - (asking - before)
                    if reply is None:
                        return
                    yield reply

            return send

        run_local(run, config, actors, lambda exchange: body(watched(exchange)))

    with tempfile.TemporaryDirectory(prefix="legolm-overhead-") as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        rows = [{"instruction": f"Say {i}", "output": "abc"[i % 3] * 2} for i in range(4 * clients)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = {
            "model": str(folder / "model"),
            "precision": "fp32",
            "data": {"train": str(folder / "data.jsonl"), "validation": 0.25, "test": 0.25, "split": {"by": "iid"}},
            "blocks": [
                {"name": "dense", "method": "dense"},
                {"name": "half", "method": "structured", "intermediate_size": 48, "calibration": {"samples": 2}},
            ],
            "clients": [{"id": f"c{i:04d}", "block": ("dense", "half")[i % 2]} for i in range(clients)],
            "lora": {"rank": 4},
            "train": {"steps": 1, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"engine": "local", "rounds": rounds, "personal_steps": 1, "personal": "last"},
        }
        config = validate(RunConfig, raw, "benchmark")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, clock = time.process_time(), time.perf_counter()
        pipeline.run(config, folder / "run", engine=engine, models=False)
        cpu, wall = time.process_time() - began, time.perf_counter() - clock
        size = {name: (folder / "run" / name).stat().st_size for name in ("metrics.jsonl", "report.html")}
    return {
        "clients": clients,
        "seconds": round(cpu - answering, 2),
        "clients_s": round(answering, 2),
        "wall_s": round(wall, 2),
        "rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "rss_before_mb": round(before / 1024, 1),
        "metrics_mb": round(size["metrics.jsonl"] / 1e6, 2),
        "report_mb": round(size["report.html"] / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[SMALL, MIDDLE, LARGE])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options.rounds)))
        return
    rows: dict[int, dict[str, Any]] = {}
    for clients in options.clients:
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--row", str(clients)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        rows[clients] = json.loads(done.stdout.splitlines()[-1])
        print(rows[clients], flush=True)
    found: dict[str, Any] = {"rounds": options.rounds, "rows": list(rows.values())}
    if MIDDLE in rows and LARGE in rows:
        small, large = rows[MIDDLE], rows[LARGE]
        found["seconds_800_over_200"] = round(large["seconds"] / small["seconds"], 3)
        found["clients_s_800_over_200"] = round(large["clients_s"] / small["clients_s"], 3)
        found["wall_800_over_200"] = round(large["wall_s"] / small["wall_s"], 3)
        found["rss_800_over_200"] = round(large["rss_mb"] / small["rss_mb"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
