"""`legolm prune`: cut blocks out of an LLM."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from legolm.cli.options import (
    Answer,
    BadRows,
    Input,
    Instruction,
    LayoutOption,
    Messages,
    Precision,
    Template,
    check_new,
    check_used,
    keeping,
    prompts_of,
    rows_of,
)
from legolm.errors import LegolmError

TEXT = "--calibration, --samples, --length, --layout, --instruction, --input, --answer, --messages, --bad-rows"


def prune(
    model: Annotated[str, typer.Argument(help="`starter`, a local folder or a hub id")],
    out: Annotated[Path, typer.Option(help="folder of the block; of several blocks, the folder they go into")],
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, structured, window, or a plugin's name")],
    sparsity: Annotated[str | None, typer.Option(help="removed share of the decoder's linear weights")] = None,
    params: Annotated[str | None, typer.Option(help="structured: parameters at most, for instance 70M")] = None,
    memory: Annotated[str | None, typer.Option(help="structured: bytes of weights at most, for instance 150MB")] = None,
    speedup: Annotated[str | None, typer.Option(help="structured: how much faster it generates, measured here")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N weights kept of each M in a row: 2:4")] = None,
    intermediate_size: Annotated[str | None, typer.Option(help="structured, window: MLP neurons kept")] = None,
    num_key_value_heads: Annotated[str | None, typer.Option(help="structured, window: KV groups kept")] = None,
    num_hidden_layers: Annotated[str | None, typer.Option(help="structured: layers kept")] = None,
    calibration: Annotated[
        str, typer.Option(help="`starter-dates`, `starter`, `pydoc`, text or conversations")
    ] = "pydoc",
    layout: LayoutOption = None,
    instruction: Instruction = None,
    input: Input = None,
    answer: Answer = None,
    messages: Messages = None,
    bad_rows: BadRows = None,
    template: Template = None,
    statistics: Annotated[list[Path] | None, typer.Option(help="instead: a file of `legolm calibrate`; repeat")] = None,
    samples: Annotated[int, typer.Option(help="calibration samples")] = 32,
    length: Annotated[int, typer.Option(help="tokens a calibration sample")] = 256,
    recover: Annotated[int, typer.Option(help="distillation steps after the cut")] = 0,
    plugin: Annotated[list[str] | None, typer.Option(help="module:name of a criterion of your own; repeat")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    precision: Precision = "fp32",
) -> None:
    """Cut one block, or several at once (`--sparsity 0.25,0.5`): checkpoints with a manifest of what they kept.

    Blocks that are there and were cut by the same recipe stay: a command that was killed goes on.
    """
    from legolm.config import block_at, load_plugins

    load_plugins(plugin or ())
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
    text: dict[str, object] = {"samples": samples, "length": length, "statistics": sums}
    if recover or not sums:
        text["text"] = calibration
    text |= rows_of(layout, instruction, input, answer, messages, bad_rows)
    wanted = []
    chosen = _each(targets)
    for target in chosen:
        values = "-".join(re.sub(r"[^\w.-]", "", value.replace(":", "of"), flags=re.A) for value in target.values())
        folder = out if len(chosen) == 1 else out / f"{method}-{values}"
        raw = {"method": method, "calibration": text} | target
        wanted.append((block_at(folder, f"--out {folder}", raw, recover, "legolm prune"), folder))
    folders = [folder for _, folder in wanted]
    for folder in folders:
        if folders.count(folder) > 1:
            raise LegolmError(f"legolm prune: {folder.name} is asked for twice; give each target once")
        if not folder.exists():
            check_new(folder)

    from legolm.data import check_text
    from legolm.models import fingerprint, lasting_name, load_tokenizer, resolve
    from legolm.prune import cut_blocks, kept_block, needs_of
    from legolm.report import print_blocks
    from legolm.system import Progress

    cuts = wanted[0][0]
    reads = needs_of(cuts) != "nothing"
    check_used(reads, "--statistics", f"a method that reads activations, as {method} does not")
    beside = "--recover beside --statistics" if statistics else f"--recover where {method} reads no text"
    check_used(recover > 0 or (reads and not statistics), TEXT, beside)
    base, progress = resolve(model), Progress()
    notes = check_text(calibration, cuts.calibration, "--calibration") if recover or not statistics else []
    digest, tokenizer = fingerprint(base), load_tokenizer(base, prompts_of(template))
    blocks = {folder: kept_block(folder, digest, spec, seed, precision, tokenizer) for spec, folder in wanted}
    left = [(spec, folder) for spec, folder in wanted if blocks[folder] is None]
    for folder in folders:
        if blocks[folder] is not None:
            progress.note(f"{folder}: is there already, cut by the same recipe")
    made = []
    if left:
        with keeping():
            made = cut_blocks(base, digest, left, seed, precision, progress, lasting_name(model), tokenizer=tokenizer)
    for note in notes:  # not before: bad input is one line
        progress.note(note)
    new = {block.path: block for block in made}
    print_blocks([blocks[folder] or new[folder] for folder in folders])


def _each(targets: dict[str, str | None]) -> list[dict[str, str]]:
    """One dict a block: where a value is a list (`0.25,0.5`), one block for each of its items."""
    given = {name: [one.strip() for one in text.split(",")] for name, text in targets.items() if text is not None}
    return [dict(zip(given, values, strict=True)) for values in product(*given.values())]
