"""What protections of updates cost and what they hold: secure sums, noise, hostile clients, leaks.

    python benchmarks/privacy.py [--only SECTION ...] [--seeds 2] [--runs FOLDER]

Sections are files of their own beside this one. `--seeds` are of attacks and leaks. `--runs` keeps the runs of loss,
which go on there where they were stopped. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def secagg(_options: argparse.Namespace) -> dict[str, Any]:
    from privacy_sums import secagg

    return secagg()


def loss(options: argparse.Namespace) -> dict[str, Any]:
    from privacy_sums import loss

    return loss(options.runs)


def attacks(options: argparse.Namespace) -> dict[str, Any]:
    from privacy_attacks import attacks

    return {"attacks": attacks(options.seeds)}


def leaks(options: argparse.Namespace) -> dict[str, Any]:
    from privacy_leaks import leaks

    return leaks(options.seeds)


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "secagg": secagg,
    "loss": loss,
    "attacks": attacks,
    "leaks": leaks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only:
        began = time.process_time()
        found |= SECTIONS[name](options)
        print(f"{name}: {time.process_time() - began:.0f} s of CPU", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
