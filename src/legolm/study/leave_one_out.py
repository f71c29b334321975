"""Leave one out (the paper's figure 5): a run without a block's clients, or without one client.

Its aggregation is replayed of the updates that it kept, where the others' are what they were while the left-out ones
still took part; or it is trained again. All losses are nats per answer token on test data. A block's is the mean over
all clients' data, each set counting the same, so that what is lost and what the federation gained over local-only
training are in one measure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

from legolm.adapter import merged
from legolm.aggregate import Scheme
from legolm.block import Block, llm_block, read_block
from legolm.config import RunConfig
from legolm.data import client_data, data_fingerprint
from legolm.errors import LegolmError, nearest
from legolm.evaluation import TEXT, Figure, Questions, check_finite, compare
from legolm.evaluation import measure as measure_all
from legolm.federate.server import Rounds, server_examples
from legolm.federate.transport import Exchange, run_local
from legolm.models import choose_device, choose_precision, dtype_of, fingerprint, load_model, load_tokenizer, resolve
from legolm.report import write_ablation
from legolm.runs import (
    Ablation,
    Global,
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
from legolm.study.retrain import WITHOUT, check_without, run_without
from legolm.system import Progress, atomic_write

Kind = Literal["block", "client"]
Case = tuple[Kind, str]
"""What is left out: its kind and name."""
Cases = Mapping[Case, tuple[str, ...]]
"""With its clients."""
Figures = Mapping[str, Figure]
Measure = Callable[[Rounds, Scheme, float], Figures]


def ablate(
    folder: Path,
    out: Path,
    questions: Questions | None,
    progress: Progress,
    retrain: bool = False,
    only: Sequence[str] = (),
) -> Ablation:
    """Write `ablation.json` and `ablation.html` into `out`, after each left-out one anew, and give the former.

    The LLM also answers the `questions`. With `retrain` each is a run of its own in a folder of `out`, and the files
    are `retrained.json` and `.html`. `only` are names of blocks and clients; all if empty. Raises `LegolmError` for a
    run without kept updates, where they are replayed, and for one that cannot be without its clients.
    """
    study = _Study(folder, out, questions, progress, retrain)
    left = study.left(only)
    if retrain:
        some = {_folder(case): clients for case, clients in left.items() if not study.is_all(clients)}
        check_without(study.run, study.config, some, out)
        progress.note(f"{len(some)} to train again without; the rounds with all took {study.seconds:,.0f} s")
        for number, (case, clients) in enumerate(left.items(), 1):
            stages = Progress(of=f"without {case[1]} ({number} of {len(left)})")
            study.add(clients, *study.retrained(clients, out / WITHOUT / _folder(case), stages))
    else:
        study.rounds.check_kept(study.last)

        def body(exchange: Exchange) -> None:
            for (_, name), clients in left.items():
                study.add(clients, *study.replayed(clients, exchange, f"without {name}: evaluate"))

        run_local(study.run, study.config, 1, body)
    return study.write()


class _Study:
    """One run, and what is found of it without each of some clients. Raises `LegolmError` for what is no such run."""

    def __init__(self, folder: Path, out: Path, questions: Questions | None, progress: Progress, retrain: bool) -> None:
        self.run = RunDir(folder)
        self.config = _config(self.run, retrain)
        identity = self.run.identity()
        self._summary = summary = _finished(folder, self.config)
        self.last, self._block_of = summary.best_round, {client.id: client.block for client in summary.clients}
        if not self.last:
            raise LegolmError(
                f"run folder {folder}: no round beat its start, which it kept; there is nothing to leave out"
            )
        if data_fingerprint(client_data(self.config), server_examples(self.config)) != identity.data_fingerprint:
            raise LegolmError(f"run folder {folder}: the data changed since the run; its losses are of other questions")
        self._file, asked = out / Ablation.file(retrain), questions.asked() if questions else None
        self._known = known = _earlier(self._file, identity.run, self.last, asked)
        blocks = _blocks(self.run, self.config, identity.base_fingerprint)
        self.rounds = Rounds(self.run, self.config, identity.run, blocks, self._block_of, progress)
        self._figures, self._cases = _figures_of(self.config, blocks["llm"], questions), _cases(self._block_of)
        # The same data in every stage: its own and the others' that a client's block is asked.
        self._data = {id: [id, *others] for id, others in others_of(self.config).items()}
        records = self.rounds.records()
        self._records = {one.round: one for one in rounds_of(records)}
        alone = {one.client: one.scores for one in clients_of(records, "local")}
        self._local = _losses(alone, self._data, None, {}) if alone else None
        self._done = {tuple(one.clients): one for one in known.without} if known else {}
        self._whose = {"run": identity.run, "questions": asked, "name": folder.resolve().name, "retrained": retrain}

    def left(self, only: Sequence[str]) -> Cases:
        """What of these names is still to do, the same clients once. Raises `LegolmError` for a name that none has."""
        names = list(dict.fromkeys(name for _, name in self._cases))
        for name in only:
            if name not in names:
                raise LegolmError(f"--only {name}: is no client, nor a block that one holds;{nearest(name, names)}")
        wanted = {clients for (_, name), clients in self._cases.items() if not only or name in only} - self._done.keys()
        first = dict[tuple[str, ...], Case]()
        for case, clients in self._cases.items():
            if clients in wanted:
                first.setdefault(clients, case)
        return {case: clients for clients, case in first.items()}

    @property
    def seconds(self) -> float:
        """Of the run's rounds."""
        return sum(one.seconds for one in self._records.values())

    def is_all(self, clients: Collection[str]) -> bool:
        """Whether nobody trains without these."""
        return len(clients) == len(self._block_of)

    def replayed(self, clients: Sequence[str], exchange: Exchange, label: str) -> tuple[Losses, Figures]:
        """Without the kept updates of these clients."""
        scheme = self.rounds.replay(self.last, clients)
        record = self.rounds.score_global(scheme, exchange, label)
        figures = self._figures(self.rounds, scheme, record.quorum)
        return self._losses(record, figures), figures

    def retrained(self, clients: Sequence[str], folder: Path, progress: Progress) -> tuple[Losses, Figures]:
        """Of a run in which these clients do not train, with the round that is best for all clients' blocks there."""
        if self.is_all(clients):
            return self._start, self._of_start
        run = run_without(self.run, self.config, clients, folder, progress)
        config, identity, best = run.known(), run.identity(), Summary.read(folder).best_round
        blocks = _blocks(run, config, identity.base_fingerprint)
        rounds = Rounds(run, config, identity.run, blocks, self._block_of, progress)
        record = next(one for one in rounds_of(rounds.records()) if one.round == best)
        figures = self._figures(rounds, rounds.scheme(best), record.quorum)
        return self._losses(record, figures), figures

    def add(self, clients: tuple[str, ...], losses: Losses, figures: Figures) -> None:
        """Keep what was found without these clients, and write it."""
        paired = {name: _paired(figure, self._of_all[name]) for name, figure in figures.items()}
        (kind, name) = next(case for case, whose in self._cases.items() if whose == clients)
        self._done[clients] = LeftOut(**losses.model_dump(), kind=kind, name=name, clients=list(clients), paired=paired)
        self.write()

    def found(self) -> Ablation:
        """All so far, in the order of the blocks and clients."""
        without = [
            self._done[clients].model_copy(update={"kind": kind, "name": name})
            for (kind, name), clients in self._cases.items()
            if clients in self._done
        ]
        shared, local = self._shared, self._local
        return Ablation(
            **self._whose,
            round=self.last,
            others=self._summary.others,
            before=self._start,
            local=local,
            all=shared,
            without=without,
            # Of those that trained alone: one may have been passed over.
            gain=fmean(loss - shared.by_client[id] for id, loss in local.by_client.items()) if local else None,
            cost=_costs(without, "block", shared, "blocks"),
            cost_clients=_costs(without, "client", shared, "blocks"),
            cost_llm=_costs(without, "block", shared, "llm"),
        )

    def write(self) -> Ablation:
        """The file and its page, of all so far."""
        found = self.found()
        atomic_write(self._file, dump_record(found))
        write_ablation(found, self._file.with_suffix(".html"))
        return found

    @cached_property
    def _start(self) -> Losses:
        return self._known.before if self._known else self._losses(self._records[0], self._of_start)

    @cached_property
    def _shared(self) -> Losses:
        return self._known.all if self._known else self._losses(self._records[self.last], self._of_all)

    @cached_property
    def _of_start(self) -> Figures:
        return self._figures(self.rounds, self.rounds.scheme(0), 0.0)

    @cached_property
    def _of_all(self) -> Figures:
        return self._figures(self.rounds, self.rounds.scheme(self.last), self.rounds.quorum(self.last))

    def _losses(self, record: Global, figures: Figures) -> Losses:
        return _losses(record.by_client(), self._data, record.llm, figures)


def _folder(case: Case) -> str:
    return "-".join(case)


def _config(run: RunDir, retrain: bool) -> RunConfig:
    """The run's. Raises `LegolmError` for a run that nothing can be left out of."""
    where = f"run folder {run.path}"
    if not run.config_file.is_file():
        raise LegolmError(f"{where}: no config.yaml; give the folder of a run")
    config = run.known()
    if config.federation.mode != "federated":
        raise LegolmError(f"{where}: mode {config.federation.mode!r} aggregates no updates; there is none to leave out")
    if retrain and config.federation.engine == "deployment":
        raise LegolmError(f"{where}: its devices have the data, and --retrain runs here; leave it out")
    if not retrain and not config.federation.keep_updates:
        raise LegolmError(
            f"{where}: its updates were not kept; run it anew with --set federation.keep_updates=true, or give "
            "--retrain, which trains again without each"
        )
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


def _cases(block_of: Mapping[str, str]) -> Cases:
    """What is left out: each block that somebody has, then each client."""
    cases: dict[Case, tuple[str, ...]] = {
        ("block", name): tuple(id for id, own in block_of.items() if own == name) for name in block_of.values()
    }
    return cases | {("client", id): (id,) for id in block_of}


def _losses(
    scores: Mapping[str, Scores], data: Mapping[str, Sequence[str]], llm: Scores | None, figures: Figures
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


def _figures_of(config: RunConfig, llm: Block, questions: Questions | None) -> Measure:
    """A function that gives the LLM's figures with a scheme's global adapter."""
    if questions is None:
        return lambda rounds, scheme, quorum: {}
    precision = choose_precision(config.precision, config.device)
    tokenizer = load_tokenizer(llm.path, config.data)
    model = load_model(llm.path, dtype_of(precision)).to(choose_device(config.device))

    def measure(rounds: Rounds, scheme: Scheme, quorum: float) -> Figures:
        with merged(model, llm.coverage, rounds.known(scheme, quorum), config.lora.scaling) as whole:
            figures = measure_all(whole, tokenizer, questions, precision)
        check_finite(figures, "the LLM with the global update")
        found = ((task, name, figure) for task, of_task in figures.items() for name, figure in of_task.items())
        return {name if task == TEXT else f"{task} {name}": figure for task, name, figure in found}

    return measure


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
