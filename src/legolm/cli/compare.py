"""`legolm compare`: several schemes on one config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import Sets, keeping


def compare(
    config: Annotated[Path, typer.Argument(help="YAML with `run` and `variants`; see examples/compare/schemes.yaml")],
    out: Annotated[Path | None, typer.Option(help="folder of all runs; runs/<name of the config> if not given")] = None,
    set_: Sets = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="run every variant with so many seeds, its own and the next ones")
    ] = 1,
    models: Annotated[
        bool, typer.Option(help="write every variant's final models; `legolm run --resume` makes left-out ones later")
    ] = True,
    blocks: Annotated[
        Path | None, typer.Option(help="folder of cut blocks, to share with other comparisons; OUT/blocks if not given")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="runs at once, each in a process of its own")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print every plan and stop")] = False,
) -> None:
    """Run several schemes on one config and put them in one table. Goes on where an earlier call stopped."""
    from legolm.system import DiskFullError, uncollected

    out = out or Path("runs") / config.stem
    if dry_run:
        with uncollected():
            from legolm.report import print_plan
            from legolm.study import check_places, plans

            planned = plans(config, set_ or (), seeds)
            for name, (settings, plan) in planned.items():
                typer.echo(f"\n{name}")
                print_plan(plan, settings)
            try:
                check_places(planned, config, out, models, seeds, blocks)
            except DiskFullError as error:  # a plan may be for another machine
                typer.echo(f"here this would be refused: {error}", err=True)
        return
    from legolm.report import print_comparison
    from legolm.study import compare as run_all

    with keeping():
        found = run_all(config, out, set_ or (), models, blocks, seeds, jobs)
    print_comparison(found, out)
