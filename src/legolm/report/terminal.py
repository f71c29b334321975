"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from legolm.block import Block, Coverage
from legolm.config import RunConfig
from legolm.evaluation import Result
from legolm.plan import Plan
from legolm.report.shown import notes, scored, stages_of
from legolm.runs import Summary

if TYPE_CHECKING:
    from legolm.composition import Composition


def wide_enough(*tables: Table) -> Console:
    """As wide as the tables, whatever the terminal: lines that wrap are better than figures cut off."""
    console = Console()
    wide = Console(width=10_000, height=console.height)
    width = max(console.width, *(wide.measure(table).maximum for table in tables))
    return Console(width=width, height=console.height)  # without a height Rich takes 80 columns on a dumb terminal


def print_plan(plan: Plan, config: RunConfig) -> None:
    """The dry run: blocks, clients, tokens, bytes, memory."""
    blocks = _table("block", "method", ">sparsity", ">parameters", ">on disk", ">memory to train", ">recovery")
    for block in plan.blocks:
        sizes = (_count(block.parameters), _mb(block.file_bytes), _mb(block.training_bytes))
        recovery = f"{block.recovery_steps} steps" if block.recovery_steps else "none"
        blocks.add_row(block.name, block.method, f"{block.sparsity:.2f}", *sizes, recovery)
    clients = _table("client", "block", ">examples", ">tokens a round", ">received a round", ">sent a round")
    for client in plan.clients:
        row = (f"{client.examples:,}", f"{client.tokens_per_round:,}", _mb(client.bytes_down), _mb(client.bytes_up))
        clients.add_row(client.id, client.block, *row)
    console = wide_enough(blocks, clients)
    console.print(blocks, clients)
    federation = config.federation
    console.print(
        f"{config.aggregate.scheme}{_settings(config.aggregate.settings)}, codec {federation.codec}, "
        f"{federation.rounds} rounds on {federation.engine}, {plan.actors} clients at once, "
        f"about {_mb(plan.memory_bytes)} of memory and {_mb(plan.disk_bytes)} of disk. Nothing was done.",
        highlight=False,
        soft_wrap=True,
    )


def _settings(settings: Mapping[str, object]) -> str:
    """A scheme's own settings in brackets."""
    return f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""


def print_blocks(blocks: Sequence[Block]) -> None:
    """What was cut."""
    table = _table("block", "method", ">sparsity", ">parameters", ">on disk", "folder")
    for block in blocks:
        row = (f"{block.sparsity:.3f}", _count(block.parameters), _mb(block.file_bytes), str(block.path))
        table.add_row(block.name, block.method, *row)
    wide_enough(table).print(table)


def print_coverage(block: Block) -> None:
    """What a block kept of the LLM, layer by layer."""
    coverage, shape = block.coverage, block.coverage.shape
    print_blocks([block])
    table = _table(
        ">block layer", ">LLM layer", f"KV groups of {shape.kv_groups}", f">neurons of {shape.neurons}", ">weights kept"
    )
    for j, layer in enumerate(coverage.layers):
        kept = coverage.kept_in(layer) / shape.layer_weights
        groups = ", ".join(map(str, coverage.groups[j]))
        table.add_row(str(j), str(layer), groups, f"{len(coverage.neurons[j]):,}", f"{kept:.1%}")
    console = wide_enough(table)
    console.print(table)
    gone = sorted(set(range(shape.layers)) - set(coverage.layers))
    lines = [f"LLM layers cut: {', '.join(map(str, gone)) or 'none'}", f"coverage {coverage.hash}"]
    lines += [f"base {block.base_fingerprint}", *(f"{name} {value}" for name, value in block.details.items())]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def print_composition(wanted: Composition) -> None:
    """The dry run of `legolm compose`: what each source holds, what the target does, and how much of it is theirs."""
    table = _table("source", "block", *(f">{size}" for size in ("layers", "KV groups", "neurons")), ">weights held")
    for column in ("rank", "examples", "weight"):
        table.add_column(column, justify="right")
    for source, weight in zip(wanted.sources, wanted.weights, strict=True):
        rest = (str(source.rank), str(source.examples or ""), f"{weight:.3g}")
        table.add_row(source.name, source.block.name, *_sizes(source.block.coverage), *rest)
    table.add_row("target", "", *_sizes(wanted.coverage), "", "", "")
    settings = ", ".join(f"{name} {value}" for name, value in wanted.method.settings.items())
    console = wide_enough(table)
    console.print(table)
    console.print(
        f"{wanted.method.name} ({settings}). Some source holds {wanted.covered:,} of the target's "
        f"{wanted.coverage.kept_weights:,} linear weights ({wanted.covered / wanted.coverage.kept_weights:.1%}); the "
        "rest stay as they are. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )


def _sizes(coverage: Coverage) -> tuple[str, ...]:
    shape = coverage.block_shape
    return str(shape.layers), str(shape.kv_groups), f"{shape.neurons:,}", f"{1 - coverage.sparsity:.1%}"


def print_summary(summary: Summary, out: Path) -> None:
    """The figures of a finished run, and where its files are."""
    columns = [(data, stage) for data in scored(summary) for stage in stages_of(summary)]
    table = _table("client", "block", *(f">{data} {stage}" for data, stage in columns))
    for client in summary.clients:
        losses = (client.loss(data).get(stage) for data, stage in columns)
        table.add_row(client.id, client.block, *("" if loss is None else f"{loss:.2f}" for loss in losses))
    console = wide_enough(table)
    console.print("Loss per answer token (nats) on test data", table)
    llm, lines, took = summary.llm, notes(summary), f"{summary.wall_s:.0f} s."
    if llm.loss_before is not None and llm.loss_after is not None:
        data = "all clients' test data" if summary.scores == "everyone" else "the server's own test data"
        took = (
            f"LLM on {data}: {llm.loss_before:.2f} before, {llm.loss_after:.2f} after round {llm.best_round} of "
            f"{summary.rounds}. {took}"
        )
    lines += [took, f"report {out / 'report.html'}", f"models {out / 'final'}"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def print_scores(results: Sequence[Result]) -> None:
    """One row a figure and model: value ± standard error, and the paired difference to the model `against`."""
    table = _table("task", "metric", "model", ">value", ">questions", "against", ">difference", ">p")
    names = _short({name for one in results for name in (one.model, one.against) if name is not None})
    for one in results:
        row = [one.task, one.metric, names[one.model], _with_error(one.figure.value, one.figure.stderr)]
        row.append(f"{one.figure.count:,}")
        if one.against is not None and one.comparison is not None:
            found = one.comparison
            row += [names[one.against], _with_error(found.difference, found.stderr, "+")]
            row.append("<0.001" if found.p < 0.001 else f"{found.p:.3f}")
        table.add_row(*row)
    wide_enough(table).print(table)


def _short(names: Iterable[str]) -> dict[str, str]:
    """The last parts of folders' names where those tell them apart."""
    whole = list(names)
    last = [name.rsplit("/", 1)[-1] for name in whole]
    return {name: end if last.count(end) == 1 else name for name, end in zip(whole, last, strict=True)}


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def _table(*columns: str) -> Table:
    """A table; a leading `>` aligns a column to the right."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _count(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
