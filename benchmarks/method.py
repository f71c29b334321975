"""What each part of the method brings: HeteAgg as it was, each change by itself, what they led to, and FedIT.

    python benchmarks/method.py [--out runs/method] [--seeds 3] [--bench dates languages] [--only NAME ...]

Two benches that the starter model learns from everyone's data: French dates, half a year a client, and dates of all
months in four languages, one a client. Four blocks are cut and recovered once, for all runs. Stopped, it goes on where
it was. `--only` runs these variants of examples/compare/method.yaml. The last line is one JSON object; losses are nats
per answer token, both they and exact matches on test data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from legolm import config as configs
from legolm.models import choose_precision, fingerprint, resolve
from legolm.prune import cut_blocks
from legolm.runs import Stage, Summary, read_stages, rounds_of
from legolm.study import compare
from legolm.system import Progress, atomic_write
from results_study import Stat

EXAMPLES = Path(__file__).parent.parent / "examples"
BENCHES: dict[str, tuple[str, ...]] = {
    "dates": ("federation.public=starter-dates",),
    "languages": (
        "data.train=starter-languages",
        "federation.public=starter-languages",
        *(f"clients.{place}.data={language}" for place, language in enumerate(("fr", "de", "es", "it"))),
    ),
}
NEW, FEDIT, SECONDS = "default", "fedit", "fedit_seconds"
STAGES: tuple[Stage, ...] = ("global", "local", "personal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/method"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bench", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--only", nargs="+", default=None)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    blocks = cut(arguments.out / "blocks")
    study = chosen(arguments.only, arguments.out)
    found: dict[str, dict[str, Any]] = {}
    for bench in arguments.bench:
        out = arguments.out / bench
        rows = compare(study, out, [*BENCHES[bench], *blocks], models=False, seeds=arguments.seeds).rows
        runs: dict[str, list[dict[str, float]]] = {}
        for row in rows:
            runs.setdefault(row.name, []).append(figures(out / str(row.folder)))
        found[bench] = {name: over_seeds(values) for name, values in runs.items()}
        show(bench, found[bench])
    print(json.dumps(found | summary(found) | {"seeds": arguments.seeds}))


def cut(out: Path) -> list[str]:
    """Cut the run's blocks into `out` where they are not there; how a config takes them from there."""
    config = configs.load(EXAMPLES / "dates.yaml", [])
    path = resolve(config.model)
    left = [(block, out / block.name) for block in config.cuts if not (out / block.name).exists()]
    if left:
        precision = choose_precision(config.precision, config.device)
        cut_blocks(path, fingerprint(path), left, config.seed, precision, Progress(), config.model)
    return [
        f"blocks.{place}={{name: {block.name}, path: {(out / block.name).resolve()}}}"
        for place, block in enumerate(config.blocks)
    ]


def chosen(names: list[str] | None, out: Path) -> Path:
    """The study, or one of some of its variants."""
    path = EXAMPLES / "compare" / "method.yaml"
    if names is None:
        return path
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    study["run"] = str((path.parent / study["run"]).resolve())
    study["variants"] = [one for one in study["variants"] if one["name"] in names]
    atomic_write(out / "some.yaml", yaml.safe_dump(study))
    return out / "some.yaml"


def figures(folder: Path) -> dict[str, float]:
    """A run's: of the LLM, and means over clients' blocks after the rounds, alone and as they end."""
    run = Summary.read(folder)
    rounds = rounds_of(read_stages(folder / "metrics.jsonl"))
    clients = len(run.clients)
    sent = sum(one.up + one.down for record in rounds for one in record.bytes.values()) / clients
    found = {
        "llm_loss": run.llm.loss_after or 0.0,
        "llm_exact": run.llm.exact_match_after or 0.0,
        "mb": sent / 1e6,
        "steps": sum(one.steps for record in rounds for one in record.train.values()) / clients,
        "seconds": sum(one.seconds for record in rounds for one in record.train.values()) / clients,
    }
    for stage in STAGES:
        ended = [one for one in run.clients if stage in one.own]
        if ended:
            found |= {
                f"{stage}_own_loss": fmean(one.own[stage] for one in ended),
                f"{stage}_own_exact": fmean(one.own_exact_match[stage] for one in ended),
                f"{stage}_others_loss": fmean(one.others[stage] for one in ended),
                f"{stage}_others_exact": fmean(one.others_exact_match[stage] for one in ended),
            }
    return found


def over_seeds(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure, and with several seeds its standard error as NAME_se."""
    every = [Stat.of(one[name] for one in runs).named(name) for name in runs[0]]
    return {name: value for one in every for name, value in one.items() if value is not None}


def show(bench: str, found: dict[str, dict[str, float]]) -> None:
    """The table that docs/aggregation.md has."""
    columns = ("llm_loss", "llm_exact", *(f"{stage}_{data}_exact" for stage in STAGES for data in ("own", "others")))
    print(f"\n{bench:15}" + "".join(f"{one.replace('_exact', ''):>17}" for one in (*columns, "mb", "steps", "seconds")))
    for name, values in found.items():
        cells = [f"{values[one]:.3f}" if one in values else "" for one in columns]
        cells = [
            f"{cell} ± {values[f'{one}_se']:.3f}" if cell and f"{one}_se" in values else cell
            for one, cell in zip(columns, cells, strict=True)
        ]
        cells += [f"{values['mb']:.1f}", f"{values['steps']:.0f}", f"{values['seconds']:.0f}"]
        print(f"{name:15}" + "".join(f"{cell:>17}" for cell in cells), flush=True)


def summary(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Of the new default: ratios of means over benches and seeds. Bytes are all that a client sent and got,
    both here with one codec, sums of its text for the cut among them."""
    if not all({NEW, FEDIT} <= set(bench) for bench in found.values()):
        return {}

    def mean(name: str, figure: str) -> float:
        return fmean(bench[name][figure] for bench in found.values())

    ratios = {
        "llm_accuracy_over_fedit": mean(NEW, "llm_exact") / mean(FEDIT, "llm_exact"),
        "bytes_over_fedit": mean(NEW, "mb") / mean(FEDIT, "mb"),
        "own_accuracy_over_alone": mean(NEW, "personal_own_exact") / mean(NEW, "local_own_exact"),
        "own_loss_over_alone": mean(NEW, "personal_own_loss") / mean(NEW, "local_own_loss"),
        "others_loss_over_global": mean(NEW, "personal_others_loss") / mean(NEW, "global_others_loss"),
    }
    if all(SECONDS in bench for bench in found.values()):
        ratios["llm_accuracy_over_fedit_at_equal_seconds"] = mean(NEW, "llm_exact") / mean(SECONDS, "llm_exact")
    return {name: round(value, 4) for name, value in ratios.items()}


if __name__ == "__main__":
    main()
