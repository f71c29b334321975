"""`legolm run`: all stages of one config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import Config, Sets, keeping


def run(
    config: Config,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/<name of the config> if not given")] = None,
    set_: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
) -> None:
    """Cut blocks, fine-tune them at the clients, aggregate, apply, evaluate, report."""
    from legolm.config import load
    from legolm.system import uncollected

    settings = load(config, set_)
    out = out or Path("runs") / config.stem
    if dry_run:
        with uncollected():
            from legolm.plan import make_plan
            from legolm.report import print_plan
            from legolm.runs import RunDir, damages

            folder = RunDir(out)
            settings = folder.settled(settings)
            plan = make_plan(settings)
            settings = settings.model_copy(update={"precision": plan.precision})
            if not resume:
                print_plan(plan, settings)
                folder.check(settings, resume)
                return
            from legolm.pipeline import changed

            lines = changed(folder, settings, folder.check(settings, resume))
            if folder.identity_file.exists():
                damages(folder, settings, lines.append)
            print_plan(plan, settings)
            for line in lines:
                typer.echo(line)
        return
    if resume and not out.exists():
        typer.echo(f"{out}: nothing to resume; starting", err=True)
    from legolm.pipeline import run as run_pipeline
    from legolm.report import print_summary

    with keeping("what is finished is kept; the same command goes on there with --resume"):
        summary = run_pipeline(settings, out, resume)
    print_summary(summary, out)
