"""Leave one out (the paper's figure 5): replay a run's aggregation without a block's clients, or without one client.

The updates are those that the run kept; the others' are what they were while the left-out ones still took part. All
losses are nats per answer token on test data. A block's is the mean over all clients' data, each set counting the same,
so that what is lost and what the federation gained over local-only training are in one measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Literal

from legolm.adapter import merged
from legolm.aggregate import Scheme
from legolm.block import Block, llm_block, read_block
from legolm.config import RunConfig
from legolm.data import client_data, data_fingerprint
from legolm.errors import LegolmError
from legolm.evaluation import TEXT, Figure, Questions, check_finite, compare, digest
from legolm.evaluation import measure as measure_all
from legolm.federate.server import Rounds, server_examples
from legolm.federate.transport import Exchange, run_local
from legolm.models import choose_device, choose_precision, dtype_of, fingerprint, load_model, load_tokenizer, resolve
from legolm.report import write_ablation
from legolm.runs import (
    Ablation,
    LeftOut,
    Losses,
    Paired,
    RunDir,
    Scores,
    Summary,
    check_sealed,
    clients_of,
    dump_record,
    finished,
    others_of,
    read_record,
    rounds_of,
)
from legolm.system import Progress, atomic_write

Kind = Literal["block", "client"]
Measure = Callable[[Scheme, float], dict[str, Figure]]


def ablate(folder: Path, out: Path, questions: Questions | None, progress: Progress) -> Ablation:
    """Write `ablation.json` and `ablation.html` into `out`, after each left-out one anew, and give the former.

    The LLM also answers the `questions`. Raises `LegolmError` for a run without kept updates.
    """
    run = RunDir(folder)
    config = _config(run)
    identity = run.identity()
    summary = _finished(folder, config)
    last, block_of = summary.best_round, {client.id: client.block for client in summary.clients}
    if not last:
        raise LegolmError(f"run folder {folder}: no round beat its start, which it kept; there is nothing to leave out")
    if data_fingerprint(client_data(config), server_examples(config)) != identity.data_fingerprint:
        raise LegolmError(f"run folder {folder}: the data changed since the run; its losses are of other questions")
    asked = _identify(questions)
    known = _earlier(out / "ablation.json", identity.run, last, asked)
    blocks = _blocks(run, config, identity.base_fingerprint)
    rounds = Rounds(run, config, identity.run, blocks, block_of, progress)
    rounds.check_kept(last)
    figures_of = _figures_of(rounds, config, blocks["llm"], questions)
    # The same data in every stage: its own and the others' that a client's block is asked.
    data = {id: [id, *others] for id, others in others_of(config).items()}

    @cache
    def with_all() -> dict[str, Figure]:
        return figures_of(rounds.scheme(last), rounds.quorum(last))

    records = rounds.records()
    by_round = {one.round: one for one in rounds_of(records)}
    alone = {one.client: one.scores for one in clients_of(records, "local")}

    def losses(number: int, figures: Mapping[str, Figure]) -> Losses:
        record = by_round[number]
        return _losses(record.by_client(), data, record.llm, figures)

    before = known.before if known else losses(0, figures_of(rounds.scheme(0), 0.0))
    shared = known.all if known else losses(last, with_all())
    local = _losses(alone, data, None, {}) if alone else None
    done = {tuple(one.clients): one for one in known.without} if known else {}
    without: list[LeftOut] = []

    def found() -> Ablation:
        return Ablation(
            run=identity.run,
            round=last,
            questions=asked,
            name=folder.resolve().name,
            others=summary.others,
            before=before,
            local=local,
            all=shared,
            without=without,
            # Of those that trained alone: one may have been passed over.
            gain=fmean(loss - shared.by_client[id] for id, loss in local.by_client.items()) if local else None,
            cost=_costs(without, "block", shared, "blocks"),
            cost_clients=_costs(without, "client", shared, "blocks"),
            cost_llm=_costs(without, "block", shared, "llm"),
        )

    def body(exchange: Exchange) -> None:
        for kind, name, clients in _cases(block_of):
            new = tuple(clients) not in done
            if new:
                scheme = rounds.replay(last, clients)
                record = rounds.score_global(scheme, exchange, f"without {name}: evaluate")
                figures = figures_of(scheme, record.quorum)
                paired = {name: _paired(figure, with_all()[name]) for name, figure in figures.items()}
                one = _losses(record.by_client(), data, record.llm, figures)
                done[tuple(clients)] = LeftOut(**one.model_dump(), kind=kind, name=name, clients=clients, paired=paired)
            without.append(done[tuple(clients)].model_copy(update={"kind": kind, "name": name}))
            if new:
                write()

    def write() -> None:
        atomic_write(out / "ablation.json", dump_record(found()))
        write_ablation(found(), out / "ablation.html")

    run_local(run, config, 1, body)
    write()
    return found()


def _config(run: RunDir) -> RunConfig:
    """The run's. Raises `LegolmError` for a run that nothing can be left out of."""
    where = f"run folder {run.path}"
    if not run.config_file.is_file():
        raise LegolmError(f"{where}: no config.yaml; give the folder of a run")
    config = run.known()
    if config.federation.mode != "federated":
        raise LegolmError(f"{where}: mode {config.federation.mode!r} aggregates no updates; there is none to leave out")
    if not config.federation.keep_updates:
        raise LegolmError(f"{where}: its updates were not kept; run it anew with --set federation.keep_updates=true")
    if not finished(run.path):
        raise LegolmError(f"{where}: no summary.json; finish the run first (legolm run CONFIG --resume)")
    return config


def _finished(folder: Path, config: RunConfig) -> Summary:
    """The summary of a finished run. Raises `LegolmError` when it is another's."""
    found = Summary.read(folder)
    ids, names = [client.id for client in config.clients], {block.name for block in config.blocks}
    fits = [one.id for one in found.clients] == ids and names >= {one.block for one in found.clients}
    if not fits or found.best_round not in range(config.federation.rounds + 1):
        path = folder / "summary.json"
        raise LegolmError(f"{path}: its clients or best_round are not the config's; write it anew: legolm run --resume")
    return found


def _blocks(run: RunDir, config: RunConfig, wanted: str) -> dict[str, Block]:
    base = resolve(config.model)
    if fingerprint(base) != wanted:
        raise LegolmError(f"run folder {run.path}: the model changed since the run; its updates are for another one")
    for one in config.blocks:
        check_sealed(run.block(one.name))
    return {"llm": llm_block(base, wanted)} | {one.name: read_block(run.block(one.name)) for one in config.blocks}


def _cases(block_of: Mapping[str, str]) -> list[tuple[Kind, str, list[str]]]:
    """(kind, name, clients) of what is left out: each block that somebody has, then each client."""
    names = dict.fromkeys(block_of.values())
    blocks: list[tuple[Kind, str, list[str]]] = [
        ("block", name, [id for id, own in block_of.items() if own == name]) for name in names
    ]
    return [*blocks, *(("client", id, [id]) for id in block_of)]


def _losses(
    scores: Mapping[str, Scores], data: Mapping[str, Sequence[str]], llm: Scores | None, figures: Mapping[str, Figure]
) -> Losses:
    """Mean losses of clients' blocks on each one's `data`, of all blocks, and of the LLM; and the LLM's other figures.

    Each set of data counts the same.
    """
    by_client = {id: fmean(found.root[one].loss for one in data[id]) for id, found in scores.items()}
    return Losses(
        blocks=fmean(by_client.values()),
        by_client=by_client,
        llm=llm.loss if llm else None,
        stderr={name: figure.stderr for name, figure in figures.items()},
        **{name: figure.value for name, figure in figures.items()},
    )


def _costs(without: Iterable[LeftOut], kind: Kind, shared: Losses, measure: str) -> dict[str, float]:
    """How much more each left-out one's loss is than with all; nothing where there is no such loss."""
    base = shared.measures()
    return {
        one.name: one.measures()[measure] - base[measure] for one in without if one.kind == kind and measure in base
    }


def _paired(figure: Figure, other: Figure) -> Paired | None:
    """The paired test against the global update, question by question."""
    comparison = compare(figure, other)
    return None if comparison is None else Paired(**asdict(comparison))


def _figures_of(rounds: Rounds, config: RunConfig, llm: Block, questions: Questions | None) -> Measure:
    """A function that gives the LLM's figures with a scheme's global adapter."""
    if questions is None:
        return lambda scheme, quorum: {}
    precision = choose_precision(config.precision, config.device)
    tokenizer = load_tokenizer(llm.path, config.data)
    model = load_model(llm.path, dtype_of(precision)).to(choose_device(config.device))

    def measure(scheme: Scheme, quorum: float) -> dict[str, Figure]:
        with merged(model, llm.coverage, rounds.known(scheme, quorum), config.lora.scaling) as whole:
            figures = measure_all(whole, tokenizer, questions, precision)
        check_finite(figures, "the LLM with the global update")
        found = ((task, name, figure) for task, of_task in figures.items() for name, figure in of_task.items())
        return {name if task == TEXT else f"{task} {name}": figure for task, name, figure in found}

    return measure


def _identify(questions: Questions | None) -> str | None:
    """What the LLM's figures stand on."""
    if questions is None:
        return None
    tasks = questions.tasks.asked(questions.limit) if questions.tasks else None
    return digest([tasks, questions.limit, questions.text, questions.length])


def _earlier(path: Path, run: str, last: int, questions: str | None) -> Ablation | None:
    """What an earlier call left. Raises `LegolmError` for another run's, one with other questions, and a broken one."""
    if not path.exists():
        return None
    found = read_record(path, Ablation, "delete it, or give another --out")
    if found.run != run:
        raise LegolmError(f"--out {path.parent}: holds the ablation of another run; give another folder")
    if found.round != last:  # the run went on with more rounds
        raise LegolmError(f"--out {path.parent}: holds the ablation of round {found.round}; give another folder")
    if found.questions != questions:
        raise LegolmError(f"--out {path.parent}: holds an ablation with other questions; give another folder")
    return found
