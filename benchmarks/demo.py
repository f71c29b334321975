"""The README's figures: the demo on the starter model, from an empty folder.

    python benchmarks/demo.py [--out runs/bench-demo] [--set a.b=value ...]

Prints what a reader of the README wants to compare, and as its last line one JSON object with the same figures. Peak
memory is the sum over this process and all it started (Flower's actors among them), sampled twice a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

STAGES = ("before", "local", "global")
KINDS = ("own_exact_match", "others_exact_match", "own", "others")
CONFIG = Path(__file__).parent.parent / "examples" / "demo.yaml"


def run_and_watch(command: list[str]) -> tuple[float, list[int]]:
    """(wall seconds, bytes of each process of the tree when their sum was highest: proportional set sizes)."""
    began = time.perf_counter()
    process = psutil.Popen(command)
    peak: list[int] = []
    while process.poll() is None:
        peak = max(peak, [*map(memory, [process, *children(process)])], key=sum)
        time.sleep(0.5)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - began, peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> int:
    # Proportional: what processes share (libraries, Ray's store) counts once.
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
        return 0


def figures(summary: dict[str, Any], wall_s: float, peak: list[int]) -> dict[str, Any]:
    clients = summary["clients"]

    def mean(kind: str, phase: str) -> float:
        return round(fmean(client[kind][phase] for client in clients), 3)

    return {
        "wall_s": round(wall_s, 1),
        "peak_memory_gb": round(sum(peak) / 1e9, 2),
        "largest_processes_gb": [round(one / 1e9, 2) for one in sorted(peak, reverse=True)[:3]],
        "llm_loss_before": round(summary["llm"]["loss_before"], 3),
        "llm_loss_after": round(summary["llm"]["loss_after"], 3),
        "llm_exact_before": round(summary["llm"]["exact_match_before"], 3),
        "llm_exact_after": round(summary["llm"]["exact_match_after"], 3),
        **{kind: {stage: mean(kind, stage) for stage in STAGES} for kind in KINDS},
        "others_better_than_alone": sum(
            c["others_exact_match"]["global"] > c["others_exact_match"]["local"] for c in clients
        ),
        "bytes_up_per_round": round(summary["bytes_up_per_round"]),
        "bytes_down_per_round": round(summary["bytes_down_per_round"]),
        "seconds": {stage: round(value, 1) for stage, value in summary["seconds"].items()},
        "machine": summary["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the run in this folder; it must not exist")
    parser.add_argument("--set", action="append", default=[], help="override a value of the config")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="legolm-demo-")) / "run"
    command = [sys.executable, "-m", "legolm.cli", "run", str(CONFIG), "--out", str(out)]
    wall_s, peak = run_and_watch([*command, *(part for one in options.set for part in ("--set", one))])
    found = figures(json.loads((out / "summary.json").read_text()), wall_s, peak)
    if options.out is None:
        shutil.rmtree(out.parent)
    for name, value in found.items():
        print(f"{name:34} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
