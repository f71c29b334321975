"""What takes a run's time? Seconds and shares of cutting, recovery, training, scoring and the rest.

    python benchmarks/run_time.py [--demo FOLDER] [--ten FOLDER] [--set a.b=value ...]

Of the demo (examples/demo.yaml) and of ten rounds (examples/dates.yaml). A finished run's folder is only read, so that
nothing runs twice; without one the example is run, with `--set` changed, into a folder that goes away. All is taken
from what the run itself recorded, over all its processes, however often it was resumed:

- `cutting` and `recovery` are of the run's blocks, wherever they were cut;
- `training` is what clients took in rounds and alone. Where actors worked side by side it is what a round took that was
  not scored (`evaluate.every`), with aggregation in it;
- `scoring` is the stage before training, and what scored rounds and the stages outside the rounds took beside training;
  without any unscored round aggregation and loading blocks count here, so that it is at most what it says;
- `undivided` is of actors side by side too: the stages outside the rounds, and without any unscored round all rounds.
  A run records each client's training and the whole of a stage, from which training and scoring cannot be told apart
  then. That they were side by side shows where clients trained for longer than the stage took; where they were and it
  does not, too much counts as training;
- `rest` is what is left of the whole: starting, aggregation of unscored rounds, final models, samples, the report.

Last line: one JSON object, with `scoring_share` of the ten rounds (aim: a third at most), `scoring_share_at_most` with
all that is undivided, and `demo_s`.
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
    stages = [alone for stage in ("local", "personal") if (alone := clients_of(records, stage))]
    # Each with the seconds that it took, and those that its clients trained.
    apart = [(max(one.seconds for one in alone), trained(one.train for one in alone if one.train)) for alone in stages]
    together = [(one.seconds, trained(one.train.values())) for one in rounds]
    side_by_side = any(own > wall for wall, own in (*together, *apart))
    training, scoring, undivided = 0.0, before.seconds, 0.0
    least = fmean(unscored) if unscored else 0.0  # of a round, before it is scored
    for one, (wall, own) in zip(rounds, together, strict=True):
        if side_by_side and not unscored:
            undivided += wall
            continue
        own = min(wall, least if side_by_side else own)
        training += own
        if one.validation is not None:
            scoring += max(0.0, wall - max(own, least))
    for wall, own in apart:
        if side_by_side:
            undivided += wall
        else:
            training, scoring = training + own, scoring + wall - own
    found = {"cutting": cut, "recovery": recovered, "training": training, "scoring": scoring, "undivided": undivided}
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
    found |= {
        "scoring_share": round(ten["scoring"] / ten["wall"], 3),
        "scoring_share_at_most": round((ten["scoring"] + ten["undivided"]) / ten["wall"], 3),
        "demo_s": round(demo["wall"], 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
