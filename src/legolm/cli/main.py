"""The command `legolm`: one subcommand a stage, and `run` for all of them. Heavy imports are inside the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import typer

from legolm.errors import LegolmError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML config of the run; see examples/")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="of matrix products")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a value: a.b=value; may be repeated")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("legolm"))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
]


@app.callback()
def main_options(version: Version = False) -> None:
    """Cut small models out of a large one, fine-tune each where its data lives, put what they learned back together."""


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
        from legolm.report import print_plan

        print_plan(make_plan(settings), settings)
        return
    if resume and not out.exists():
        typer.echo(f"{out}: nothing to resume; starting", err=True)
    from legolm.pipeline import run as run_pipeline
    from legolm.report import print_summary

    print_summary(run_pipeline(settings, out, resume), out)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="`starter`, a local folder or a hub id")],
    out: Annotated[Path, typer.Option(help="folder of the block; of several blocks, the folder they go into")],
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt or structured")],
    sparsity: Annotated[str | None, typer.Option(help="removed share of the decoder's linear weights")] = None,
    params: Annotated[str | None, typer.Option(help="structured: parameters at most, for instance 70M")] = None,
    memory: Annotated[str | None, typer.Option(help="structured: bytes of weights at most, for instance 150MB")] = None,
    speedup: Annotated[str | None, typer.Option(help="structured: how much faster it generates, measured here")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N weights kept of each M in a row: 2:4")] = None,
    intermediate_size: Annotated[str | None, typer.Option(help="structured: MLP neurons kept")] = None,
    num_key_value_heads: Annotated[str | None, typer.Option(help="structured: KV groups kept")] = None,
    num_hidden_layers: Annotated[str | None, typer.Option(help="structured: layers kept")] = None,
    calibration: Annotated[str, typer.Option(help="`starter`, `pydoc`, a text file or conversations")] = "pydoc",
    statistics: Annotated[list[Path] | None, typer.Option(help="instead: a file of `legolm calibrate`; repeat")] = None,
    samples: Annotated[int, typer.Option(help="calibration samples")] = 32,
    length: Annotated[int, typer.Option(help="tokens a calibration sample")] = 256,
    recover: Annotated[int, typer.Option(help="distillation steps after the cut")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    precision: Precision = "fp32",
) -> None:
    """Cut one block, or several at once (`--sparsity 0.25,0.5`): checkpoints with a manifest of what they kept."""
    from legolm.config import BlockConfig, validate

    targets = {
        "sparsity": sparsity,
        "params": params,
        "memory": memory,
        "speedup": speedup,
        "pattern": pattern,
        "intermediate_size": intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
    }
    sums = [str(path) for path in statistics] if statistics else None
    if statistics and len({path.resolve() for path in statistics}) < len(statistics):
        raise LegolmError("--statistics: a file is given twice; its client would count twice")
    text = {"text": calibration, "samples": samples, "length": length, "statistics": sums}
    wanted = []
    chosen = _each(targets)
    for target in chosen:
        values = "-".join(value.replace(":", "of") for value in target.values())
        folder = out if len(chosen) == 1 else out / f"{method}-{values}"
        block = {"name": folder.name, "method": method, "calibration": text, "recover": {"steps": recover}} | target
        wanted.append((validate(BlockConfig, block, "legolm prune"), folder))
    folders = [folder for _, folder in wanted]
    for folder in folders:
        if folders.count(folder) > 1:
            raise LegolmError(f"legolm prune: {folder.name} is asked for twice; give each target once")
        _check_new(folder)

    from legolm.models import fingerprint, lasting_name, resolve
    from legolm.prune import cut_blocks
    from legolm.report import print_blocks
    from legolm.system import Progress

    base = resolve(model)
    print_blocks(cut_blocks(base, fingerprint(base), wanted, seed, precision, Progress(), lasting_name(model)))


def _each(targets: dict[str, str | None]) -> list[dict[str, str]]:
    """One dict a block: where a value is a list (`0.25,0.5`), one block for each of its items."""
    given = {name: text.split(",") for name, text in targets.items() if text is not None}
    return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="`starter`, a local folder or a hub id")],
    text: Annotated[str, typer.Option(help="a text file or a file of conversations; it stays where it is")],
    out: Annotated[Path, typer.Option(help="file of sums to write")],
    needs: Annotated[
        Literal["diagonal", "full"], typer.Option(help="squares only (wanda), or all second moments")
    ] = "full",
    samples: Annotated[int, typer.Option(help="samples of the text")] = 32,
    length: Annotated[int, typer.Option(help="tokens a sample")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    precision: Precision = "fp32",
) -> None:
    """Private calibration: write sums of activation statistics, which `legolm prune --statistics` adds up."""
    from legolm.config import CalibrationConfig, validate

    settings = validate(CalibrationConfig, {"text": text, "samples": samples, "length": length}, "legolm calibrate")
    _check_new(out)

    from legolm.data import calibration_tokens
    from legolm.models import fingerprint, load_tokenizer, resolve
    from legolm.prune import collect, save_statistics
    from legolm.system import Progress

    base = resolve(model)
    tokens = calibration_tokens(settings, load_tokenizer(base), seed)
    save_statistics(collect(base, fingerprint(base), tokens, needs, precision, Progress()), out)
    typer.echo(out)


@app.command()
def inspect(block: Annotated[Path, typer.Argument(help="a block's folder")]) -> None:
    """What a block kept of the LLM: layers, KV groups, neurons, weights."""
    from legolm.block import read_block
    from legolm.report import print_coverage

    print_coverage(read_block(block))


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="`starter`, a block's or a checkpoint's folder, or a hub id")],
    tasks: Annotated[str | None, typer.Option(help="of lm-evaluation-harness: hellaswag,arc_easy")] = None,
    include: Annotated[Path | None, typer.Option(help="folder of your own YAML tasks; their code runs")] = None,
    data: Annotated[str | None, typer.Option(help="a file of instructions and answers")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for perplexity")] = None,
    base: Annotated[str | None, typer.Option(help="the LLM of the blocks, if it is not the starter")] = None,
    adapter: Annotated[Path | None, typer.Option(help="a PEFT adapter's folder, put on the model")] = None,
    rouge: Annotated[bool, typer.Option("--rouge", help="also generate the answers, for ROUGE-L; slow")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions of each task and of --data")] = None,
    instruction: Annotated[str | None, typer.Option(help="field of the instruction, `instruction`")] = None,
    answer: Annotated[str | None, typer.Option(help="field of the answer, `output`")] = None,
    messages: Annotated[str | None, typer.Option(help="instead of both: field of a list of role and content")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a perplexity window, 1024")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="at most this many windows")] = None,
    precision: Precision = "fp32",
    out: Annotated[Path | None, typer.Option(help="JSON file of all figures, with every question's part")] = None,
) -> None:
    """Tasks, answers and perplexity, with standard errors; a block beside its LLM, with a paired test."""
    if out is not None:
        _check_new(out)
    from legolm.config import Fields
    from legolm.evaluate import evaluate as evaluate_all
    from legolm.evaluate import line_up, read_questions, write_json
    from legolm.report import print_scores

    given = {"instruction": instruction, "answer": answer, "messages": messages}
    named = {name: field for name, field in given.items() if field is not None}
    if messages is not None and len(named) > 1:
        raise LegolmError(f"--messages {messages}: instead of --instruction and --answer; give the one or the others")
    fields = Fields(**named) if named else None
    questions = read_questions(_names(tasks), include, data, fields, text, limit, rouge, length, windows)
    results = evaluate_all(line_up(models, base, adapter), questions, precision)
    print_scores(results)
    if out is not None:
        write_json(results, questions, precision, out)
        typer.echo(out)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML with `run` and `variants`; see examples/compare/schemes.yaml")],
    out: Annotated[Path | None, typer.Option(help="folder of all runs; runs/<name of the config> if not given")] = None,
    set_: Sets = None,
    models: Annotated[
        bool, typer.Option(help="write every variant's final models; `legolm run --resume` makes left-out ones later")
    ] = True,
    blocks: Annotated[
        Path | None, typer.Option(help="folder of cut blocks, to share with other comparisons; OUT/blocks if not given")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print every plan and stop")] = False,
) -> None:
    """Run several schemes on one config and put them in one table. Goes on where an earlier call stopped."""
    from legolm.report import print_comparison
    from legolm.study import compare as run_all
    from legolm.study import plans

    if dry_run:
        from legolm.report import print_plan

        for name, (settings, plan) in plans(config, set_ or ()).items():
            typer.echo(f"\n{name}")
            print_plan(plan, settings)
        return
    out = out or Path("runs") / config.stem
    print_comparison(run_all(config, out, set_ or (), models, blocks), out)


@app.command()
def compose(
    sources: Annotated[list[str], typer.Argument(help="folders of a run's final/, or BLOCK:ADAPTER (a PEFT adapter)")],
    into: Annotated[str, typer.Option(help="llm, union, layers=30,kv_groups=3,neurons=1536, or a block's folder")],
    out: Annotated[Path, typer.Option(help="folder of the composed model")],
    base: Annotated[str | None, typer.Option(help="the LLM; what the sources' run recorded if not given")] = None,
    method: Annotated[str, typer.Option(help="heteagg, task_arithmetic or ties")] = "heteagg",
    form: Annotated[str | None, typer.Option(help="heteagg: exact (products, default) or factor")] = None,
    scaling: Annotated[float | None, typer.Option(help="task_arithmetic, ties: factor of the change, 1")] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of each change that is kept, 0.2")] = None,
    weights: Annotated[str | None, typer.Option(help="one a source: 1,2,1; by training examples if not given")] = None,
    validate: Annotated[str | None, typer.Option(help="weights by loss on this file of instructions, answers")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what is held and covered, and stop")] = False,
) -> None:
    """Combine what separately trained blocks learned into one block, or into the LLM."""
    _check_new(out)

    from legolm.compose import choose_method, plan
    from legolm.compose import compose as put_together
    from legolm.report import print_blocks, print_composition
    from legolm.system import Progress

    progress = Progress()
    chosen = choose_method(method, form, scaling, density)
    wanted = plan(sources, into, base, chosen, weights, validate, progress)
    if dry_run:
        print_composition(wanted)
        return
    print_blocks([put_together(wanted, out, progress)])


@app.command()
def ablate(
    folder: Annotated[Path, typer.Argument(help="run folder, made with federation.keep_updates: true")],
    out: Annotated[Path | None, typer.Option(help="folder of ablation.json and .html; RUN if not given")] = None,
    tasks: Annotated[str | None, typer.Option(help="that the LLM answers: hellaswag,arc_easy")] = None,
    include: Annotated[Path | None, typer.Option(help="folder of your own YAML tasks; their code runs")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions of each task")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file for the LLM's perplexity")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a perplexity window, 1024")] = None,
) -> None:
    """Leave each block, then each client, out of the aggregation. Goes on where an earlier call stopped."""
    from legolm.evaluate import read_questions
    from legolm.report import print_ablation
    from legolm.study import ablate as leave_out
    from legolm.system import Progress, check_room

    if not folder.is_dir():
        raise LegolmError(f"run folder {folder}: no such folder; give that of a run")
    check_room(out or folder)
    names, questions = _names(tasks), None
    if limit and not names:
        raise LegolmError("--limit: only with --tasks; give that too, or leave it out")
    if names or text or include or limit or length:
        questions = read_questions(names, include, None, None, text, limit, length=length)
    print_ablation(leave_out(folder, out or folder, questions, Progress()), out or folder)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write `report.html` again from `summary.json`."""
    from legolm.report import write_report
    from legolm.runs import Summary, read_record

    path = folder / "summary.json"
    if not path.is_file():
        raise LegolmError(f"run folder {folder}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    write_report(read_record(path, Summary), folder / "report.html")
    typer.echo(folder / "report.html")


def _check_new(out: Path) -> None:
    """Raise `LegolmError` when `--out` is there or cannot be made: before the work, not after it."""
    from legolm.system import check_room

    if out.exists():
        raise LegolmError(f"--out {out}: is already there; give another one")
    check_room(out)


def _names(listed: str | None) -> list[str]:
    names = [name.strip() for name in (listed or "").split(",") if name.strip()]
    if listed is not None and not names:
        raise LegolmError(f"--tasks {listed!r}: names no task; write names with commas between them")
    return names


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
