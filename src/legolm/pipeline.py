"""A whole run: cut blocks, assign them, run the rounds, write what everyone ends with, report.

Resumable at every stage: a run that was killed goes on where it was, and with the local engine ends bit for bit where
an undisturbed run ends.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from legolm.adapter import FROZEN
from legolm.aggregate import make_scheme
from legolm.block import Block, llm_block, read_block, rename_block
from legolm.config import AUTO, RunConfig
from legolm.data import DATE, client_data, data_fingerprint, prompt_look
from legolm.errors import LegolmError
from legolm.federate.server import (
    Rounds,
    ask,
    asks_clients,
    calibrate,
    fit,
    place,
    place_frozen,
    server_examples,
    steps_of,
    whiten,
)
from legolm.federate.transport import Engine, Exchange, engine_for
from legolm.federate.wire import Offer, OfferRequest, block_files, block_id
from legolm.final import write_final
from legolm.finetune import learning_rate, planned_steps
from legolm.models import (
    choose_device,
    choose_precision,
    fingerprint,
    lasting_name,
    load_tokenizer,
)
from legolm.plan import Plan, PlannedClient, make_plan
from legolm.prune import cut_blocks, recipe_of
from legolm.report import Trackers, need_matplotlib, summarize, write_report
from legolm.runs import (
    HASHES,
    Clock,
    Difference,
    Identity,
    Machine,
    RunDir,
    Summary,
    again,
    check_blocks,
    drop_damaged,
    dump_sealed,
    mend,
    point_adapters,
    seal,
)
from legolm.system import (
    Progress,
    atomic_folder,
    atomic_write,
    check_room,
    held_bytes,
    link,
    locked,
    machine,
    release_memory,
    versions,
)

NAMES = {"local": "training alone", "personal": "the personal models", "final": "the final models"}
"""Of stages, as people read them."""


def run(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
    store: Path | None = None,
    models: bool = True,
) -> Summary:
    """Run `config` in the folder `out` and return its summary. Raises `LegolmError` for bad input.

    `engine` replaces the configured one, for tests and for other transports. Runs with the same `store` share blocks
    and their scores before training. Without `models` no final models are written and no sample
    answers asked for, but those that are there stay; a resumed run would.
    """
    clock = Clock(RunDir(out).clock_file)
    need_matplotlib()
    config = RunDir(out).settled(config)
    progress = progress or Progress()
    engine = engine or engine_for(config)
    plan = make_plan(config)
    config = config.model_copy(update={"precision": plan.precision})  # decided once a run
    apart = plan.models_bytes if not models or config.final else 0
    check_room(out, plan.disk_bytes - apart - held_bytes(out))
    if config.final is not None:
        place = Path(config.final)
        check_room(place, plan.models_bytes * models - held_bytes(place), "final")
    RunDir(out).check(config, resume)
    with locked(out):
        progress.tick = clock.tick
        try:
            return _run(config, out, resume, progress, engine, store, models, plan, clock)
        finally:
            clock.stop()


def _run(
    config: RunConfig,
    out: Path,
    resume: bool,
    progress: Progress,
    engine: Engine,
    store: Path | None,
    models: bool,
    plan: Plan,
    clock: Clock,
) -> Summary:
    changes = RunDir(out).check(config, resume)
    for line in changed(RunDir(out), config, changes):
        progress.note(line)
    if clock.broken:
        progress.note(f"{RunDir(out).clock_file}: is not what the run wrote; its times count from here")
    clock.forget(*(stage for change in changes for stage in again(change.field) or ()))
    came = any(change.field == "clients" for change in changes)
    if came:
        _check_data(RunDir(out), config)
    folder = RunDir.open(out, config, resume, plan.data_fingerprint if came else None)
    identity = _identify(folder, config, plan)
    mend(folder, config, progress.note)

    name, blocks = out.resolve().name, dict[str, Block]()
    rounds: Rounds

    def block_of() -> dict[str, str]:
        """What is decided now."""
        return {client.id: client.block for client in plan.clients}

    def begin() -> Rounds:
        train = {client.id: config.train.model_copy(update=_settings(client)) for client in plan.clients}
        shared = store / "before" if store else None
        return Rounds(folder, config, identity.run, blocks, block_of(), progress, shared, clock, train)

    def cut(exchange: Exchange | None = None) -> None:
        """The blocks, where clients are asked by sums of their own text; and the rounds of them."""
        nonlocal blocks, rounds
        with clock.stage("blocks", recorded=False):
            if exchange is not None:
                calibrate(folder, config, identity, plan.base, block_of(), exchange, progress)
            if make_scheme(config.aggregate).whitened is not None and not folder.frozen.exists():
                whiten(folder, config, llm_block(plan.base, identity.base_fingerprint), progress)
            blocks = _cut_blocks(folder, config, plan, identity.base_fingerprint, progress, store)
            if config.federation.fitted and not folder.protection.exists():
                fit(folder, config, blocks, block_of(), progress, store)
        rounds = begin()
        rounds.write_lines()

    asked_first = asks_clients(folder, config)
    if not asked_first:
        cut()
    track = Trackers(folder, config, progress.note)

    def so_far() -> Summary:
        found = rounds.records()
        return summarize(config, blocks, block_of(), found, identity, name, clock.wall, clock.seconds("blocks"))

    def after_round() -> None:
        if config.federation.engine == "deployment":  # whose rounds take as long as devices do
            write_report(so_far(), out / "report.html")
        track(rounds.records)

    def work(exchange: Exchange) -> None:
        nonlocal config, plan, rounds
        if asked_first:
            cut(exchange)
        if undecided := [client.id for client in config.clients if client.block == AUTO]:
            folder.place(place(_offers(folder, config, plan, identity.run), undecided, exchange, progress))
            config = folder.settled(config)
            plan = make_plan(config)
            rounds = begin()
        rounds.after_round = after_round
        rounds.run(exchange)

    if asked_first or not rounds.finished:
        folder.unfinish()
        for line in plan.read:
            progress.note(line)
        engine(folder, config, plan.actors, work)
    track(rounds.records, finished=True)
    if models:
        with clock.stage("final", recorded=False):
            write_final(folder, config, plan, blocks, block_of(), rounds, progress)
        point_adapters(folder)
    samples = ask(folder, config, blocks, block_of(), rounds, progress, anew=models)

    summary = so_far().model_copy(update={"samples": samples})
    summary.write(out)
    write_report(summary, out / "report.html")
    return summary


def _offers(folder: RunDir, config: RunConfig, plan: Plan, run: str) -> OfferRequest:
    """What a device is asked that may hold any of the blocks; it is for no client yet."""
    train = config.train
    # How many examples it has nobody knows.
    steps = planned_steps(train, train.steps, None, train.max_length)
    tokens = steps * train.batch_size * train.max_length
    offers = [
        Offer(
            name=one.name,
            id=block_id(block_files(folder.block(one.name))),
            parameters=one.parameters,
            bytes=one.file_bytes,
            memory=one.least_bytes,
            operations=tokens * one.token_flops,
            tokens=tokens,
        )
        for one in plan.blocks
    ]
    deadline = config.federation.deadline_s
    return OfferRequest(run=run, client="", precision=plan.precision, deadline_s=deadline, offers=offers)


def _settings(client: PlannedClient) -> dict[str, int | bool]:
    """What of the section `train` is the client's own."""
    return {
        "micro_batch_tokens": client.micro_batch_tokens,
        "gradient_checkpointing": client.gradient_checkpointing,
    }


def changed(folder: RunDir, config: RunConfig, changes: Sequence[Difference]) -> list[str]:
    """What a resumed run changes, a line a field that matters: what stays, and what is made again."""
    done, lines = folder.rounds_done(), []
    for one in changes:
        if (stages := again(one.field)) is None:
            continue
        there = [NAMES[stage] for stage in stages if _made(folder, stage)]
        line = f"{one.field} was {one.old} and is {one.new}"
        line += f"; round{'s 1 to' if done > 1 else ''} {done} stay{'s' if done == 1 else ''}" if done else ""
        line += f"; made again: {', '.join(there)}" if there else ""
        lines.append(line)
    if (
        done
        and any(one.field == "federation.rounds" for one in changes)
        and _rates_differ(folder.known(), config, done)
    ):
        lines.append(
            f"train.schedule {config.train.schedule} follows the steps of the whole run: the rounds to come have the "
            "rates of this longer or shorter run, those that are done keep theirs, so that a run begun with these "
            "settings ends elsewhere (not so with train.schedule constant)"
        )
    return lines


def _made(folder: RunDir, stage: str) -> bool:
    return bool(folder.models()) if stage == "final" else (folder.path / stage).exists()


def _rates_differ(known: RunConfig, config: RunConfig, done: int) -> bool:
    """Whether the finished rounds had other learning rates than in a run begun with `config`."""
    copies = len(config.clients) if config.federation.mode == "pooled" else 1
    steps = [copies * steps_of(one, "round", 1)[2] for one in (known, config)]
    one, two = (learning_rate(config.train, total) for total in steps)
    return any(one(step) != two(step) for step in range(copies * done * config.train.steps))


def _identify(folder: RunDir, config: RunConfig, plan: Plan) -> Identity:
    """`run.json`: what the run stands on. Raises `LegolmError` when it changed since the run started.

    A simulation is known by its config. Devices remember runs, what they answered in them and which sums they opened:
    to them another run of the same config is another one.
    """
    known_by_config = hashlib.sha256(folder.config_file.read_bytes()).hexdigest()[:16]
    found = Identity(
        run=secrets.token_hex(8) if config.federation.engine == "deployment" else known_by_config,
        base_fingerprint=fingerprint(plan.base),
        data_fingerprint=plan.data_fingerprint,
        template=plan.template,
        machine=Machine(**machine()),
        versions=versions(),
        config=config.model_dump(mode="json"),
    )
    if not folder.identity_file.exists():
        atomic_write(folder.identity_file, dump_sealed(found))
    known = folder.identity()
    for changed, what in (
        (known.base_fingerprint != found.base_fingerprint, "model"),
        (known.data_fingerprint != found.data_fingerprint, "data"),
        (known.template != found.template, f"chat template {config.data.template}"),
    ):
        if changed:
            raise LegolmError(f"run folder {folder.path}: the {what} changed since the run started; give another --out")
    return known


def _check_data(folder: RunDir, config: RunConfig) -> None:
    """Raise `LegolmError` where the clients that were there have other data beside those that came."""
    if not folder.identity_file.exists():
        return
    old = {client.id for client in folder.known().clients}
    held = {id: data for id, data in client_data(config).items() if id in old}
    if data_fingerprint(held, server_examples(config)) != folder.identity().data_fingerprint:
        raise LegolmError(
            f"run folder {folder.path}: belongs to another config, `clients` differs: with those who came the others' "
            f"data are not what they were (data.split by {config.data.split.by}); give another --out"
        )


def _cut_blocks(
    folder: RunDir,
    config: RunConfig,
    plan: Plan,
    base_fingerprint: str,
    progress: Progress,
    store: Path | None,
) -> dict[str, Block]:
    """Every block of the config, by name, cut or found finished; and the LLM as `llm`."""
    blocks = {"llm": llm_block(plan.base, base_fingerprint)}
    precision, device = choose_precision(config.precision, config.device), choose_device(config.device)
    tokenizer = load_tokenizer(plan.base, config.data)
    prompts = "".join(f"|{one}" for one in (plan.template, tokenizer.init_kwargs.get(DATE)) if one)
    left = [spec for spec in config.cuts if not folder.block(spec.name).exists()]
    sums = folder.sums if folder.sums.exists() else None
    made = {spec.name: Path(spec.path) for spec in left if spec.path is not None}
    for spec in left:
        if spec.path is not None:
            continue
        details = json.dumps(recipe_of(spec, config.seed, precision, sums))
        recipe = f"{spec.method}|{details}|{base_fingerprint}{prompts}"
        name = f"{spec.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
        made[spec.name] = store / name if store else folder.block(spec.name)

    def finish(block: Path) -> None:
        """What is the run's own, and the hashes of all."""
        place_frozen(folder, block)
        seal(block)

    with ExitStack() as held:
        for place in sorted(place for place in made.values() if place.parent == store):
            held.enter_context(locked(place.parent / ".cut" / place.name, wait=True))  # another run may be cutting it
            drop_damaged(place, progress.note)
        if wanted := [(spec, made[spec.name]) for spec in left if not made[spec.name].exists()]:
            model, base = lasting_name(config.model), plan.base
            last = seal if store else finish
            cut_blocks(
                base, base_fingerprint, wanted, config.seed, precision, progress, model, device, tokenizer, sums, last
            )
    for spec in left:
        if made[spec.name] == folder.block(spec.name):
            continue
        with atomic_folder(folder.block(spec.name)) as partial:
            _link_all(made[spec.name], partial)
            if spec.path is not None:
                rename_block(partial, spec.name)  # the run's, whatever it was called where it was cut
                if prompt_look(load_tokenizer(partial)) != prompt_look(tokenizer):
                    progress.note(f"block {spec.name}: was cut with another chat template or date; it gets this run's")
                    _replace_tokenizer(tokenizer, partial)
            finish(partial)
    check_blocks(folder, config)
    for spec in config.blocks:
        path = folder.block(spec.name)
        blocks[spec.name] = read_block(path)
        if blocks[spec.name].base_fingerprint != base_fingerprint:
            raise LegolmError(f"block {path}: was cut from another base model; remove it and run again with --resume")
    release_memory()
    return blocks


def _replace_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put the run's in the place of a block's own; its files may have other names elsewhere, which stay."""
    new = folder / ".tokenizer"
    tokenizer.save_pretrained(new)
    for file in folder.glob("*chat_template*"):  # one that has no template writes none in their place
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in new.iterdir():
        file.replace(folder / file.name)
    new.rmdir()


def _link_all(block: Path, folder: Path) -> None:
    """Second names for a block's files, but of what is another run's, in folders of our own: its may be read-only."""
    for file in block.rglob("*"):
        if file.is_file() and file.name not in (HASHES, FROZEN):
            new = folder / file.relative_to(block)
            new.parent.mkdir(parents=True, exist_ok=True)
            link(file, new)
