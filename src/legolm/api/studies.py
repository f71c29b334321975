"""The studies and compositions of the command, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from legolm.api.door import door
from legolm.block import Block
from legolm.composition import choose_method, plan
from legolm.composition import compose as put_together
from legolm.config import RowsConfig
from legolm.config import validate as check
from legolm.errors import LegolmError
from legolm.evaluation import Questions
from legolm.runs import Ablation, Comparison
from legolm.study import ablate as leave_out
from legolm.study import compare as run_all
from legolm.system import Progress, check_new


@door
def compare(
    study: str | Path,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    models: bool = True,
    seeds: int = 1,
    jobs: int = 1,
) -> Comparison:
    """Run every variant of a study's YAML in a folder below `out`, and go on where an earlier call stopped.

    `changes` (`a.b=value`) override the run that the variants vary; without `models` no final ones are written. With
    more `seeds` every variant runs with so many: its own and the next ones. `jobs` run at once, a process each.
    """
    return run_all(Path(study), Path(out), changes, models, seeds=seeds, jobs=jobs)


@door
def ablate(
    run: str | Path,
    out: str | Path | None = None,
    *,
    questions: Questions | None = None,
    retrain: bool = False,
    only: Sequence[str] = (),
) -> Ablation:
    """Leave each block, then each client, or `only` those of these names, out of a run.

    Of its aggregation (made with `federation.keep_updates`), or, to `retrain`, by a run without each, below `out`. The
    LLM also answers `questions`. Writes `ablation.json` and `.html` (`retrained.json`) into `out`, or the run's folder.
    """
    folder = Path(run)
    return leave_out(folder, Path(out) if out is not None else folder, questions, Progress(), retrain, only)


@door
def compose(
    sources: Sequence[str | Path | Block],
    into: str | Path | Block,
    out: str | Path,
    *,
    base: str | None = None,
    method: str = "heteagg",
    form: str | None = None,
    scaling: float | None = None,
    density: float | None = None,
    weights: Sequence[float] | None = None,
    validate: str | None = None,
    rows: Mapping[str, Any] | None = None,
) -> Block:
    """Put what separately trained blocks learned into one block or the LLM, written to the folder `out`.

    `sources` are "RUN:CLIENT", folders of a run's final/ or "BLOCK:ADAPTER"; `into` is `llm`, `union`, sizes
    ("layers=30,kv_groups=3,neurons=1536") or a block. `weights` are one a source, or `validate` a file of answers to
    weigh them by, read as `rows` says ({"layout": "dolly"}, as a config's `data`). Raises `LegolmError` for an
    `out` that is there, and for what does not fit.
    """
    if rows and validate is None:
        raise LegolmError("compose: `rows` says how those of `validate` are read; give that too, or leave it out")
    folder, progress = Path(out), Progress()
    check_new(folder)
    names = [str(one.path if isinstance(one, Block) else one) for one in sources]
    target = str(into.path if isinstance(into, Block) else into)
    numbers = None if weights is None else ",".join(map(str, weights))
    chosen = choose_method(method, form, scaling, density)
    read = check(RowsConfig, dict(rows or {}), "compose")
    return put_together(plan(names, target, base, chosen, numbers, validate, progress, read), folder, progress)
