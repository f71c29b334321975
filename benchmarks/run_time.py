"""What takes a run's time? Seconds and shares of cutting, recovery, training, scoring and the rest.

    python benchmarks/run_time.py [--demo FOLDER] [--ten FOLDER] [--set a.b=value ...]

Of the demo (examples/demo.yaml) and of ten rounds (examples/dates.yaml). A finished run's folder is only read, so that
nothing runs twice; without one the example is run, with `--set` changed, into a folder that goes away. All is taken
from what the run itself recorded, over all its processes, however often it was resumed:

- `cutting` and `recovery` are of the run's blocks, wherever they were cut;
- `training` is what clients took in rounds and alone. Where actors worked side by side it is what a round took that was
  not scored (`evaluate.every`), with aggregation in it;
- `scoring` is the stage before training, and what scored rounds and the stages outside the rounds took beside training;
  without any unscored round aggregation and loading blocks count here, so that scoring is no less than it says;
- `rest` is what is left of the whole: starting, aggregation of unscored rounds, final models, samples, the report.

Last line: one JSON object, with `scoring_share` of the ten rounds (aim: a third at most) and `demo_s`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from legolm.block import read_block
from legolm.runs import RunDir, Summary, Training, clients_of, read_stages, rounds_of

EXAMPLES = Path(__file__).parent.parent / "examples"


def times(folder: Path) -> dict[str, float]:
    """Seconds of each part of a finished run, and of all of it (`wall`)."""
    summary, records = Summary.read(folder), read_stages(folder / "metrics.jsonl")
    made = [read_block(RunDir(folder).block(spec.name)).details for spec in RunDir(folder).known().cuts]
    recovered = sum(details.get("recover", {}).get("seconds", 0.0) for details in made)
    cut = summary.seconds["blocks"] - recovered
    before, *rounds = rounds_of(records)
    unscored = [one.seconds for one in rounds if one.validation is None]
    training, scoring = 0.0, before.seconds
    for one in rounds:
        own = trained(one.train.values())
        if own > one.seconds:  # side by side
            own = fmean(unscored) if unscored else one.seconds
        training += min(own, one.seconds)
        if one.validation is not None:
            scoring += max(0.0, one.seconds - max(own, fmean(unscored) if unscored else 0.0))
    for stage in ("local", "personal"):
        if alone := clients_of(records, stage):
            wall = max(one.seconds for one in alone)
            own = min(wall, trained(one.train for one in alone if one.train))
            training, scoring = training + own, scoring + wall - own
    found = {"cutting": cut, "recovery": recovered, "training": training, "scoring": scoring}
    return {**found, "rest": summary.wall_s - sum(found.values()), "wall": summary.wall_s}


def trained(parts: Iterable[Training]) -> float:
    """Seconds of some clients' training, one after the other."""
    return sum(one.seconds for one in parts)


def run(example: str, settings: list[str], scratch: Path) -> Path:
    """The folder of an example's run."""
    config, out = EXAMPLES / f"{example}.yaml", scratch / example
    changed = [part for one in settings for part in ("--set", one)]
    command = [sys.executable, "-m", "legolm.cli", "run", str(config), "--out", str(out), *changed]
    subprocess.run(command, check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="a finished run of the demo")
    parser.add_argument("--ten", type=Path, help="a finished run of ten rounds")
    parser.add_argument("--set", action="append", default=[], help="override a value of the configs that are run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="legolm-time-") as scratch:
        demo = times(options.demo or run("demo", options.set, Path(scratch)))
        ten = times(options.ten or run("dates", options.set, Path(scratch)))
    found: dict[str, object] = {}
    for name, one in (("demo", demo), ("ten_rounds", ten)):
        shares = {part: round(seconds / one["wall"], 3) for part, seconds in one.items() if part != "wall"}
        print(f"{name}: {one['wall']:.0f} s; " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
        found[name] = {"seconds": {part: round(seconds, 1) for part, seconds in one.items()}, "shares": shares}
    print(
        json.dumps(found | {"scoring_share": round(ten["scoring"] / ten["wall"], 3), "demo_s": round(demo["wall"], 1)})
    )


if __name__ == "__main__":
    main()
