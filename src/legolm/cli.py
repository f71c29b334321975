"""The command `legolm`: one subcommand a stage, and `run` for all of them. Heavy imports are inside the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from legolm.types import LegolmError

app = typer.Typer(
    help="Cut small language models out of a large one, fine-tune each where its data lives, "
    "put what they learned back together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="YAML config of the run; see examples/")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of matrix products")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a value: a.b=value; may be repeated")]


@app.command()
def run(
    config: Config,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/<name of the config> if not given")] = None,
    set_: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
) -> None:
    """Cut blocks, fine-tune them at the clients, aggregate, apply, evaluate, report."""
    from legolm.config import load

    settings = load(config, set_)
    out = out or Path("runs") / config.stem
    if dry_run:
        from legolm.plan import make_plan
        from legolm.report.terminal import print_plan

        print_plan(make_plan(settings), settings)
        return
    from legolm.pipeline import run as run_pipeline
    from legolm.report.terminal import print_summary

    print_summary(run_pipeline(settings, out, resume), out)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="`starter`, a local folder or a hub id")],
    out: Annotated[Path, typer.Option(help="folder of the block")],
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt or structured")],
    sparsity: Annotated[float | None, typer.Option(help="removed share of the decoder's linear weights")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, N weights kept of each M in a row, for instance 2:4")
    ] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="structured: MLP neurons kept")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="structured: KV groups kept")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="structured: layers kept")] = None,
    calibration: Annotated[str, typer.Option(help="`starter`, `pydoc` or a text file")] = "pydoc",
    samples: Annotated[int, typer.Option(help="calibration samples")] = 32,
    length: Annotated[int, typer.Option(help="tokens a calibration sample")] = 256,
    recover: Annotated[int, typer.Option(help="distillation steps after the cut")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    precision: Precision = "fp32",
) -> None:
    """Cut one block: a normal checkpoint with a manifest of what it kept."""
    from legolm.config import BlockConfig, validate

    block: dict[str, Any] = {
        "name": out.name,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "intermediate_size": intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
        "calibration": {"text": calibration, "samples": samples, "length": length},
        "recover": {"steps": recover},
    }
    spec = validate(BlockConfig, block, "legolm prune")
    if out.exists():
        raise LegolmError(f"--out {out}: is already there; give another folder")

    from legolm.models import fingerprint, load_config, resolve, shape_of
    from legolm.progress import Progress
    from legolm.prune import cut_block
    from legolm.report.terminal import print_blocks

    base = resolve(model)
    steps = (spec.num_hidden_layers or shape_of(load_config(base)).layers) + spec.recover.steps
    with Progress().stage(f"cut block {spec.name}", steps) as advance:
        found = cut_block(base, fingerprint(base), spec, out, seed, precision, advance)
    print_blocks([found])


@app.command()
def inspect(block: Annotated[Path, typer.Argument(help="a block's folder")]) -> None:
    """What a block kept of the LLM: layers, KV groups, neurons, weights."""
    from legolm.prune import read_block
    from legolm.report.terminal import print_coverage

    print_coverage(read_block(block))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="`starter`, a block's folder, a checkpoint's folder or a hub id")],
    data: Annotated[str | None, typer.Option(help="a file of instructions and answers")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for perplexity")] = None,
    instruction: Annotated[str, typer.Option(help="field of the instruction")] = "instruction",
    answer: Annotated[str, typer.Option(help="field of the answer")] = "output",
    length: Annotated[int, typer.Option(help="tokens a perplexity window")] = 1024,
    windows: Annotated[int | None, typer.Option(help="at most this many windows")] = None,
    precision: Precision = "fp32",
) -> None:
    """Loss and exact match on answers, perplexity on text."""
    if data is None and text is None:
        raise LegolmError("eval: nothing to evaluate on; give --data, --text or both")
    from legolm.evaluate.files import evaluate_files
    from legolm.report.terminal import print_scores

    fields = {"instruction": instruction, "answer": answer}
    print_scores(evaluate_files(model, data, text, fields, length, windows, precision))


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML with `run` and `variants`; see examples/compare/schemes.yaml")],
    out: Annotated[Path | None, typer.Option(help="folder of all runs; runs/<name of the config> if not given")] = None,
) -> None:
    """Run several schemes on one config and put them in one table. Goes on where an earlier call stopped."""
    from legolm.study import compare as run_all
    from legolm.study import print_comparison

    out = out or Path("runs") / config.stem
    print_comparison(run_all(config, out), out)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write `report.html` again from `summary.json`."""
    from legolm.report import write_report
    from legolm.rundir import read_json

    if not (folder / "summary.json").is_file():
        raise LegolmError(f"run folder {folder}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    write_report(read_json(folder / "summary.json"), folder / "report.html")
    typer.echo(folder / "report.html")


def main() -> None:
    """Entry point: bad input gives one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except LegolmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
