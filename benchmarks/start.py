"""What a start costs: CPU seconds (user and system) of `import legolm`, of the help, and of a dry run of the demo.

    python benchmarks/start.py [--runs 5] [--config examples/demo.yaml]

Each is the median of fresh processes, which take turns; a first turn, that fills caches, does not count. Beside them
what a dry run cannot do without: torch, and transformers' config and tokenizer of the same model, read by themselves.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

DEMO = Path(__file__).parent.parent / "examples" / "demo.yaml"
READ = """
import sys, torch
from transformers import AutoConfig, AutoTokenizer
AutoConfig.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
"""


def cpu_seconds(command: list[str]) -> float:
    """Of one process. Ends this one if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="processes of each")
    parser.add_argument("--config", type=Path, default=DEMO, help="of the dry run")
    options = parser.parse_args()
    from legolm.config import load
    from legolm.models import resolve

    model = resolve(load(options.config).model)
    commands = {
        "import": ["-c", "import legolm"],
        "help": ["-m", "legolm.cli", "--help"],
        "dry_run": ["-m", "legolm.cli", "run", str(options.config), "--dry-run"],
        "torch": ["-c", "import torch"],
        "transformers": ["-c", READ, str(model)],
    }
    turns = [{name: cpu_seconds(command) for name, command in commands.items()} for _ in range(options.runs + 1)]
    found = {name: round(median(turn[name] for turn in turns[1:]), 2) for name in commands}
    for name, seconds in found.items():
        print(f"{name:<14}{seconds:6.2f} s")
    print(json.dumps({"cpu_seconds": found, "runs": options.runs, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
