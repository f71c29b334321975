"""What protections of updates cost and what they hold: secure sums, noise, hostile clients, leaks.

    python benchmarks/privacy.py [--only SECTION] [--seeds 2]

Sections are files of their own beside this one. Last line: one JSON object, by section.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any


def secagg(seeds: int) -> dict[str, Any]:
    from privacy_secagg import secagg

    return secagg(seeds)


def secagg_loss(seeds: int) -> dict[str, Any]:
    from privacy_secagg import loss

    return loss(seeds)


SECTIONS: dict[str, Callable[[int], dict[str, Any]]] = {"secagg": secagg, "secagg_loss": secagg_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in [options.only] if options.only else SECTIONS:
        began = time.process_time()
        found[name] = SECTIONS[name](options.seeds)
        print(f"{name}: {time.process_time() - began:.0f} s of CPU")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
