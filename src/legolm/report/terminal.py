"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from legolm.block import Block, Coverage, picture
from legolm.config import AUTO, RunConfig
from legolm.evaluation import TEXT, Evaluation, Result
from legolm.plan import Plan
from legolm.report.fit import print_lines, print_table, shortened
from legolm.report.shown import SPEAKERS, notes, scored, stages_of
from legolm.runs import Part, RunDir, Summary

if TYPE_CHECKING:
    from legolm.composition import Composition
    from legolm.export import Speed


def print_plan(plan: Plan, config: RunConfig) -> None:
    """The dry run: blocks, clients, tokens, bytes, memory."""
    blocks = []
    for block in plan.blocks:
        sizes = (_count(block.parameters), _mb(block.file_bytes), _mb(block.training_bytes))
        recovery = f"{block.recovery_steps} steps" if block.recovery_steps else ""
        blocks.append((block.name, block.method, f"{block.sparsity:.2f}", *sizes, recovery))
    print_table(("block", "method", ">sparsity", ">parameters", ">on disk", ">memory to train", ">recovery"), blocks)
    clients = []
    for client, asked in zip(plan.clients, config.clients, strict=True):
        name = f"{AUTO}, at most {client.block}" if asked.block == AUTO else client.block
        examples = "its own" if client.examples is None else f"{client.examples:,}"
        row = (examples, f"{client.tokens_per_round:,}", _mb(client.bytes_down), _mb(client.bytes_up))
        clients.append((client.id, name, *row))
    print_table(("client", "block", ">examples", ">tokens a round", ">received a round", ">sent a round"), clients)
    if any(client.profile for client in config.clients):
        _print_budgets(plan, config)
    federation = config.federation
    said = (
        f"{config.aggregate.scheme}{_settings(config.aggregate.settings)}, codec {federation.codec}, "
        f"{federation.rounds} rounds on {federation.engine}, {plan.actors} clients at once, "
        f"about {_mb(plan.memory_bytes)} of memory and {_mb(plan.disk_bytes)} of disk. Nothing was done."
    )
    print_lines([said, *plan.read, *plan.notes])


def _print_budgets(plan: Plan, config: RunConfig) -> None:
    """How each client trains within its device's memory."""
    rows = []
    for planned, client in zip(plan.clients, config.clients, strict=True):
        budget = _mb(client.profile.memory_mb * 1e6) if client.profile else ""
        checkpointing = "on" if planned.gradient_checkpointing else "off"
        settings = f"{planned.micro_batch_tokens:,}", checkpointing, plan.precision
        rows.append((client.id, planned.block, budget, _mb(planned.training_bytes), *settings))
    names = (">budget", ">memory to train", ">tokens at once", "checkpointing", "precision")
    print_table(("client", "block", *names), rows)


def _settings(settings: Mapping[str, object]) -> str:
    """A scheme's own settings in brackets."""
    return f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""


def print_blocks(blocks: Sequence[Block]) -> None:
    """What was cut."""
    rows = [
        (one.name, one.method, f"{one.sparsity:.3f}", _count(one.parameters), _mb(one.file_bytes)) for one in blocks
    ]
    print_table(("block", "method", ">sparsity", ">parameters", ">on disk"), rows)
    print_lines(f"folder {one.path}" for one in blocks)


def print_coverage(block: Block) -> None:
    """What a block kept of the LLM, drawn, and layer by layer in figures."""
    coverage, shape = block.coverage, block.coverage.shape
    print_blocks([block])
    Console().print(f"\n{picture(coverage, block.sparsity)}\n", highlight=False, markup=False)
    rows = []
    for j, layer in enumerate(coverage.layers):
        kept = coverage.kept_in(layer) / shape.layer_weights if coverage.sparsity else 1 - block.sparsity
        groups = ", ".join(map(str, coverage.groups[j]))
        rows.append((str(j), str(layer), groups, f"{len(coverage.neurons[j]):,}", f"{kept:.1%}"))
    names = (f"KV groups of {shape.kv_groups}", f">neurons of {shape.neurons}", ">weights kept")
    print_table((">block layer", ">LLM layer", *names), rows)
    gone = sorted(set(range(shape.layers)) - set(coverage.layers))
    lines = [f"LLM layers cut: {', '.join(map(str, gone)) or 'none'}", f"coverage {coverage.hash}"]
    lines += [f"base {block.base_fingerprint}", *(f"{name} {value}" for name, value in block.details.items())]
    print_lines(lines)


def print_composition(wanted: Composition) -> None:
    """The dry run of `legolm compose`: what each source holds, what the target does, and how much of it is theirs."""
    rows = []
    for source, weight in zip(wanted.sources, wanted.weights, strict=True):
        rest = (str(source.rank), str(source.examples or ""), f"{weight:.3g}")
        rows.append((source.name, source.block.name, *_sizes(source.block.coverage), *rest))
    rows.append(("target", "", *_sizes(wanted.coverage), "", "", ""))
    sizes = (">layers", ">KV groups", ">neurons", ">weights held")
    print_table(("source", "block", *sizes, ">rank", ">examples", ">weight"), rows)
    settings = ", ".join(f"{name} {value}" for name, value in wanted.method.settings.items())
    said = (
        f"{wanted.method.name} ({settings}). Some source holds {wanted.covered:,} of the target's "
        f"{wanted.coverage.kept_weights:,} linear weights ({wanted.covered / wanted.coverage.kept_weights:.1%}); the "
        "rest stay as they are. Nothing was written."
    )
    print_lines([said])


def _sizes(coverage: Coverage) -> tuple[str, ...]:
    shape = coverage.block_shape
    return str(shape.layers), str(shape.kv_groups), f"{shape.neurons:,}", f"{1 - coverage.sparsity:.1%}"


def print_summary(summary: Summary, out: Path) -> None:
    """The figures of a finished run, and where its files are."""
    for data in scored(summary):
        stages = [stage for stage in stages_of(summary) if any(stage in one.loss(data) for one in summary.clients)]
        rows = []
        for client in summary.clients:
            losses, exact = client.loss(data), client.exact_match(data)
            cells = (f"{losses[one]:.3f} {exact.get(one, 0):4.0%}" if one in losses else "" for one in stages)
            rows.append((client.id, client.block, *cells))
        whose = "the clients' own" if data == "own" else "other clients'"
        title = f"Loss (nats per answer token) and exact answers on {whose} test data"
        print_table(("client", "block", *(f">{stage}" for stage in stages)), rows, title=title)
    if mixing := [one for one in summary.clients if one.weights]:
        parts: tuple[Part, ...] = get_args(Part)
        rows = [
            (one.id, *(f"{one.weights[part]:.0%}" if part in one.weights else "" for part in parts)) for one in mixing
        ]
        title = "What each client's personal model is a mixture of, chosen by its own validation data"
        title += "; the global update answers what is unlike its own questions" if summary.by_input else ""
        print_table(("client", *(f">{part}" for part in parts)), rows, title=title)
    print_samples(summary)
    llm, lines, took = summary.llm, notes(summary), f"{summary.wall_s:.0f} s."
    if llm.loss_before is not None and llm.loss_after is not None and summary.rounds:
        asked = "all clients' test data" if summary.scores == "everyone" else "the server's own test data"
        took = (
            f"LLM on {asked}: {llm.loss_before:.3f} before, {llm.loss_after:.3f} after round {llm.best_round} of "
            f"{summary.rounds}. {took}"
        )
    lines += [took, f"report {out / 'report.html'}", f"models {RunDir(out).finals}"]
    print_lines(lines)


def print_samples(summary: Summary) -> None:
    """A few test questions, and under each what the client's block and the LLM answer; right ones are marked."""
    if not summary.samples:
        return
    console = Console()
    console.print("\nTest questions, and answers that are right to the letter (✓)", highlight=False)
    for one in summary.samples:
        answers = {SPEAKERS[speaker]: text for speaker, text in one.answers.items()}
        print_answers(f"{one.client}, {one.block}", one.question, one.wanted, answers)
    console.print()


def print_answers(whose: str, question: str, wanted: str, answers: Mapping[str, str]) -> None:
    """A question, the wanted answer and each model's, a line each: what is longer is cut with an ellipsis."""
    console = Console()
    asked = f"{whose}: {question}" if whose else question
    console.print(shortened(asked, console.width), highlight=False, markup=False)
    wide = min(max(map(cell_len, ("wanted", *answers))), console.width // 2)
    for name, text in {"wanted": wanted, **answers}.items():
        mark = "✓" if name != "wanted" and text.strip() == wanted.strip() else " "
        label = set_cell_size(shortened(name, wide), wide)
        line = shortened(text, console.width - wide - 5)
        console.print(f" {mark} {label}  {line}", highlight=False, markup=False)


def print_evaluation(found: Evaluation) -> None:
    """All of `legolm eval`: figures, what the models cost, a few answers, and what says less than it seems to."""
    names = _short(one.model for one in found.sizes)
    for task in dict.fromkeys(one.task for one in found.results):
        _print_scores([one for one in found.results if one.task == task], names)
    rows = [
        (names[one.model], _count(one.parameters), _mb(one.bytes), f"{one.tokens_per_s:,.1f}") for one in found.sizes
    ]
    print_table(("model", ">parameters", ">on disk", ">tokens a second"), rows, title="\nSize, and speed here")
    if found.answered:
        Console().print("\nAnswers that are right to the letter have a ✓", highlight=False)
    for asked in found.answered:
        print_answers("", asked.question, asked.wanted, {names[model]: text for model, text in asked.answers.items()})
    print_lines(f"warning: {warning}" for warning in found.warnings)


def print_speeds(speeds: Sequence[Speed]) -> None:
    """All of `legolm bench`."""
    rows, names = [], _short(dict.fromkeys(one.model for one in speeds))
    for one in speeds:
        energy = "" if one.joules is None else f"{one.joules:.2f}"
        times = (f"{one.prefill:,.0f}", f"{one.decode:,.1f}", f"{1e3 * one.first_s:,.0f}")
        rows.append(
            (
                names[one.model],
                one.runtime,
                *times,
                _mb(one.memory),
                _mb(one.bytes),
                energy,
            )
        )
    columns = (">prefill/s", ">decode/s", ">first, ms", ">peak", ">bytes", ">J/token")
    shown = columns if any(one.joules is not None for one in speeds) else columns[:-1]
    title = "Tokens a second, read and written; time to the first token; peak memory"
    print_table(("model", "runtime", *shown), [row[: len(shown) + 2] for row in rows], title=title)


def _print_scores(results: Sequence[Result], names: Mapping[str, str]) -> None:
    """One row a figure and model: value ± standard error, and the paired difference to the model `against`."""
    rows = []
    for one in results:
        row = [one.metric, names[one.model], _with_error(one.figure.value, one.figure.stderr), "", "", ""]
        if one.against is not None and one.comparison is not None:
            found = one.comparison
            row[3:] = names[one.against], _with_error(found.difference, found.stderr, "+"), f"{found.p:.3f}"
            row[5] = "<0.001" if found.p < 0.001 else row[5]
        rows.append(row)
    task = results[0].task
    title = f"{task}, {results[0].figure.count:,} {'windows' if task == TEXT else 'questions'}"
    print_table(("metric", "model", ">value", "against", ">difference", ">p"), rows, 2, title)


def _short(names: Iterable[str]) -> dict[str, str]:
    """The last parts of folders' names where those tell them apart."""
    whole = list(names)
    last = [name.rsplit("/", 1)[-1] for name in whole]
    return {name: end if last.count(end) == 1 else name for name, end in zip(whole, last, strict=True)}


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _count(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
