"""What a run will do and need, before it does anything: the dry run, the disk check and the number of actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from legolm.adapter import adapter_keys, adapter_layout, adapter_parameters, modules_of
from legolm.aggregate import make_scheme, rehearse
from legolm.block import Base, Block, Coverage, llm_block
from legolm.config import BlockConfig, ClientConfig, Precision, RunConfig
from legolm.data import (
    ClientData,
    Examples,
    TokenRows,
    check_tokens,
    check_whole,
    client_data,
    data_fingerprint,
    shortened,
    tokens_of,
)
from legolm.errors import LegolmError, MissingDataError
from legolm.federate.server import public_examples, server_examples, start_factors
from legolm.federate.transport import check_engine
from legolm.federate.wire import encoded_bytes
from legolm.finetune import planned_steps
from legolm.models import (
    check_weights,
    choose_device,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve,
)
from legolm.plan.assign import assign
from legolm.plan.checks import check_clients, check_files, check_sums, check_texts, given_blocks
from legolm.plan.disk import frozen_bytes, mixed_parts, stages_bytes, sums_bytes, sums_memory
from legolm.plan.needs import leaner, settings_of, training_bytes, worst_batch
from legolm.plan.notes import notes, prompt_notes
from legolm.plan.privacy import promised
from legolm.plan.secure import summed
from legolm.plan.trainees import Trainees, check_layers
from legolm.privacy import bits_for
from legolm.prune import criterion_of, planned_coverage, target_pattern
from legolm.system import available_bytes

SPARE_BYTES = 3 << 29
"""Memory left to the server, Flower's own processes and the system when actors are counted."""
ACTOR_SHARE = 1.5
"""What an actor holds over one training: it trains and scores many blocks in turn (measured by benchmarks/demo.py)."""


@dataclass(frozen=True)
class PlannedBlock:
    """One block: stored parameters, checkpoint bytes, peak bytes and operations a token of fine-tuning it, recovery.

    The peak is that of the client with the longest batch, without a memory budget; `least_bytes` is the same with the
    leanest settings.

    `token_flops` are the decoder's products: 4 a weight, two forward and two for the input's gradient; the masked
    forward of unstructured blocks also needs the weights' gradient. `recovery_steps` is the most.
    """

    name: str
    method: str
    sparsity: float
    parameters: int
    file_bytes: int
    training_bytes: int
    least_bytes: int
    token_flops: int
    recovery_steps: int


@dataclass(frozen=True)
class PlannedClient:
    """One client's work in a round: examples held, tokens trained on, bytes of tensors each way (headers are more).

    And how it trains: tokens at once, whether layers are computed again, and the peak memory (bytes) that this takes.
    Of a device of its own nobody knows the examples (None), and the tokens are the most.
    """

    id: str
    block: str
    examples: int | None
    tokens_per_round: int
    bytes_down: int
    bytes_up: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    training_bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole run. `memory_bytes` is the peak over all processes; `disk_bytes` what the run folder will hold.

    `llm_flops` and `llm_bytes` are the operations a token and the peak bytes of fine-tuning the LLM itself.
    `models_bytes` of the latter are the final models. `template` is the chat template where the config names one.
    `read` says how rows were read, `notes` how far promises go (`plan.notes`).
    """

    base: Path
    precision: Precision
    blocks: tuple[PlannedBlock, ...]
    clients: tuple[PlannedClient, ...]
    llm_flops: int
    llm_bytes: int
    data_fingerprint: str
    actors: int
    memory_bytes: int
    disk_bytes: int
    models_bytes: int
    template: str
    read: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """Every client's data, the tokens of each of its training examples, and the fingerprint of what all have.

    `tokenizer` has the run's chat template. `read` says how the rows were read: layouts, text that nothing uses, rows
    that were left out; `notes` how prompts look.
    """

    data: dict[str, ClientData]
    lengths: dict[str, np.ndarray]
    fingerprint: str
    tokenizer: Any
    read: tuple[str, ...]
    notes: tuple[str, ...]


@contextmanager
def _naming_fetch(config: RunConfig) -> Iterator[None]:
    """Say beside missing data the command that brings them (`data.fetch`)."""
    try:
        yield
    except MissingDataError as error:
        way = f"{error}; bring it: {config.data.fetch}" if config.data.fetch else str(error)
        raise LegolmError(way) from None


def parts_key(config: RunConfig) -> str:
    """All that `read_parts` reads of a config: configs with the same have the same parts."""
    return config.model_dump_json(
        include={
            "model": True,
            "seed": True,
            "data": True,
            "clients": {"__all__": {"id", "data"}},
            "train": {"batch_size", "max_length", "long_examples", "turns"},
            "federation": {"engine"},
            "evaluate": {"server_data"},
        }
    )


def read_parts(config: RunConfig) -> Parts:
    """Read and tokenize the data. Raises `LegolmError` for bad rows, a client without any, and refused long ones.

    Devices' rows stay there: all that a client trains on at once may be as long as any.
    """
    with _naming_fetch(config):
        return _read_parts(config)


def _read_parts(config: RunConfig) -> Parts:
    path, said = resolve(config.model), list[str]()
    if config.federation.engine == "deployment":
        longest = np.full(config.train.batch_size, config.train.max_length)
        server, tokenizer = server_examples(config, said), load_tokenizer(path, config.data)
        lengths = {client.id: longest for client in config.clients}
        return Parts({}, lengths, data_fingerprint({}, server), tokenizer, tuple(said), ())
    data, tokenizer, most = client_data(config, said), load_tokenizer(path, config.data), config.train.max_length
    refuse, most = config.train.long_examples == "refuse", min(most, load_config(path).max_position_embeddings)
    lengths, learned, tools = {}, list[TokenRows](), 0
    for client, rows in data.items():
        for split in ("train", "validation", "test"):
            texts = (message.content for row in getattr(rows, split) for message in row.messages)
            check_tokens(texts, tokenizer, f"data: {split} rows of {client!r}")
        for split in ("train", "validation", "test") if refuse else ("train",):
            held: Examples = getattr(rows, split)
            found = tokens_of(held, tokenizer, most, config.train.turns if split == "train" else "last")
            tools += held.with_tools
            if refuse:
                check_whole(found, most, split, client)
            if split == "train":
                lengths[client] = found.lengths
                learned.append(found)
    said += shortened(dict(zip(data, learned, strict=True)), most)
    server = server_examples(config, said)
    if refuse:
        check_whole(tokens_of(Examples.of(server), tokenizer, most), most, "evaluate.server_data", "llm")
    chats = any(not row.raw for rows in data.values() for row in rows.train)
    notes = prompt_notes(tokenizer, learned, chats, tools)
    return Parts(data, lengths, data_fingerprint(data, server), tokenizer, tuple(said), notes)


def make_plan(config: RunConfig, parts: Parts | None = None) -> Plan:
    """Resolve the model, read the data unless it is given, add up. Raises `LegolmError` for whatever cannot work."""
    path = resolve(config.model)
    model = load_config(path)
    # Nothing here but a start asks whose weights they are, and the fingerprint takes time.
    base = Base.of(path, "", model)
    shape, width = base.shape, base.dtype.itemsize
    choose_device(config.device)
    check_engine(config)
    with _naming_fetch(config):
        of_texts = check_files(config, path, shape)
        if config.federation.personal == "by_input":
            public_examples(config, public := list[str]())
            of_texts += tuple(public)
    rehearse(config.aggregate)
    modules_of(shape, config.lora.ranks, "lora.ranks")
    if make_scheme(config.aggregate).frozen_side and config.lora.rank > shape.hidden:
        raise LegolmError(
            f"lora.rank {config.lora.rank}: the factors that stay frozen are orthonormal, and the hidden size is "
            f"{shape.hidden}; lower it, or take aggregate.form factor"
        )
    check_weights(path)
    parts = parts or read_parts(config)
    check_texts(config, parts.tokenizer)
    lengths = parts.lengths
    if few := [id for id, rows in lengths.items() if len(rows) < 2 and config.federation.personal == "by_input"]:
        raise LegolmError(
            f"federation.personal: by_input: client {few[0]} has one training example, and its questions are told from "
            "others by each other; give it two, or take mixture"
        )
    batches = {client: worst_batch(found.tolist(), config.train.batch_size) for client, found in lengths.items()}
    longest = max(batches.values(), key=sum)

    coverages: dict[str, Coverage] = {}
    parameters, masked, patterned = dict[str, int](), dict[str, float](), set[str]()
    given = given_blocks(config, path)
    for spec in config.cuts:
        there = given.get(spec.name)
        coverage, masked[spec.name] = _held(spec, base, there)
        coverages[spec.name] = coverage
        parameters[spec.name] = there.parameters if there else base.parameters_of(coverage.kept_weights)
        criterion = criterion_of(spec)
        if criterion is not None:
            criterion.rehearse(target_pattern(spec, shape))
        if (criterion or coverage.masks) and not spec.adapter:
            patterned.add(spec.name)
    trainees = Trainees(config, base, coverages, patterned)
    precision, fits = assign(config, batches, parameters, trainees)
    blocks = []
    for spec in config.cuts:
        coverage, criterion, there = coverages[spec.name], criterion_of(spec), given.get(spec.name)
        usual, *others = (
            training_bytes(trainees.of(spec.name), longest, one, precision) for one in leaner(config.train, longest)
        )
        bits = coverage.unmasked().kept_weights if criterion or coverage.masks else 0
        blocks.append(
            PlannedBlock(
                name=spec.name,
                method=spec.method,
                sparsity=target_pattern(spec, shape).sparsity if criterion else (there or coverage).sparsity,
                parameters=parameters[spec.name],
                file_bytes=parameters[spec.name] * width + frozen_bytes(config, coverage) + bits // 8,
                training_bytes=usual,
                least_bytes=min(usual, *others),
                token_flops=(6 if spec.name in patterned else 4) * coverage.kept_weights,
                recovery_steps=spec.recover.most_steps,
            )
        )
    block_of = {id: fit.block for id, fit in fits.items()}

    dense = {block.name for block in blocks if block.method == "dense"}
    check_clients(config, block_of, dense)
    if config.lora.start is not None or config.aggregate.start is not None:
        start_factors(config, llm_block(path, fingerprint(path)))
    clients, traffic = [], dict[tuple[str, tuple[int, ...], int], tuple[int, int]]()
    trains = {one.id: check_layers(one, config, coverages[block_of[one.id]]) for one in config.clients}
    taking = [one for one in config.clients if not config.federation.capable or block_of[one.id] in dense]
    ranks = [one.rank or config.lora.rank for one in taking]
    for client in config.clients:
        block = block_of[client.id]
        mean_length = float(lengths[client.id].mean())
        steps = planned_steps(
            config.train, config.train.steps, len(lengths[client.id]) if parts.data else None, mean_length
        )
        tokens = round(steps * config.train.batch_size * mean_length)
        rank = client.rank or config.lora.rank
        most = 0, 0  # of the rounds, where their blocks differ
        held = {name: coverages[name] for name in client.blocks or ()} or {block: trains[client.id]}
        for name, trained in held.items() if client in taking else ():
            like = name, trained.layers, rank
            if like not in traffic:
                traffic[like] = _traffic(config, coverages[name], trained, rank, masked[name], ranks)
            most = max(most, traffic[like])
        fit = fits[client.id]
        clients.append(
            PlannedClient(
                client.id,
                block,
                len(lengths[client.id]) if parts.data else None,
                tokens,
                *most,
                micro_batch_tokens=fit.settings.micro_batch_tokens,
                gradient_checkpointing=fit.settings.gradient_checkpointing,
                training_bytes=fit.memory,
            )
        )

    if config.federation.mode == "pooled":  # whose batches are of everyone's rows
        longest = worst_batch(np.concatenate(list(lengths.values())).tolist(), config.train.batch_size)
    whole = training_bytes(trainees.whole, longest, settings_of(config.train), precision)
    actor = int(
        max(whole, *(fit.memory for fit in fits.values()))
        * (ACTOR_SHARE if config.federation.engine == "flower" else 1)
    )
    actors = _actors(config, actor)
    size_of = {block.name: block.file_bytes for block in blocks}
    adapter = 8 * adapter_parameters(Coverage.full(shape), config.lora.targets, config.lora.rank)
    two = config.federation.personal == "by_input"  # of each client
    models = (
        base.parameters * width
        + sum(size_of[client.block] for client in clients) * (1 + two)
        + adapter * (1 + (mixed_parts(config) + two) * len(clients))
    )
    disk = models + sum(size_of.values()) + stages_bytes(config, shape, ranks) + sums_bytes(config, shape)
    if config.federation.keep_updates:
        disk += config.federation.rounds * sum(client.bytes_up for client in clients)
    memory = SPARE_BYTES + actors * actor + sums_memory(config, shape)
    members = [(trains[one.id], rank) for one, rank in zip(taking, ranks, strict=True)]
    counts = {one.id: len(lengths[one.id]) for one in taking} if parts.data else {}
    said = notes(config, members, counts)
    said += promised(config, dict(zip((one.id for one in taking), members, strict=True)), counts)
    said += summed(config, coverages, dict(zip((one.id for one in taking), members, strict=True)))
    template = "" if config.data.template == "model" else str(parts.tokenizer.chat_template)
    said += check_sums(config, shape, base.parameters * width)
    read, said = parts.read + of_texts, (*parts.notes, *said)
    return Plan(
        path,
        precision,
        tuple(blocks),
        tuple(clients),
        4 * Coverage.full(shape).kept_weights,
        whole,
        parts.fingerprint,
        actors,
        memory,
        disk,
        models,
        template,
        read,
        said,
    )


def upload_of(config: RunConfig, block: str) -> Callable[[ClientConfig, int], int]:
    """Bytes of tensors that a client with this block of the config sends in a round at a rank: `f(client, rank)`."""
    path = resolve(config.model)
    spec = next(one for one in config.blocks if one.name == block)
    coverage, masked = _held(spec, Base.of(path, "", load_config(path)), given_blocks(config, path).get(block))
    return lambda client, rank: _upload(config, check_layers(client, config, coverage), rank, masked)


def _held(spec: BlockConfig, base: Base, there: Block | None) -> tuple[Coverage, float]:
    """What a block covers, and the share of its matrices that a bit mask takes from what is trained."""
    coverage = there.coverage if there else planned_coverage(spec, base)
    cut = target_pattern(spec, base.shape).sparsity if criterion_of(spec) else coverage.mask_sparsity
    return coverage, 0.0 if spec.adapter else cut


def _upload(config: RunConfig, trained: Coverage, rank: int, sparsity: float) -> int:
    scheme = make_scheme(config.aggregate)
    keys = adapter_keys(trained, config.lora.targets, trained=scheme.frozen_side)
    changed = adapter_layout(trained, keys, rank, config.lora.ranks)
    if config.privacy.secure is not None:
        return changed.total * bits_for(len(config.clients)) // 8  # at most: what few hold is not sent
    return encoded_bytes(changed, config.federation.codec, scheme.keep(sparsity))


def _traffic(
    config: RunConfig, coverage: Coverage, trained: Coverage, rank: int, sparsity: float, ranks: Sequence[int]
) -> tuple[int, int]:
    """Bytes (down, up) of one client's tensors in a round that it takes part in, with clients of `ranks`."""
    if config.federation.mode != "federated":
        return 0, 0
    scheme, codec = make_scheme(config.aggregate), config.federation.codec
    keys = adapter_keys(coverage, config.lora.targets, trained=scheme.frozen_side)
    own = adapter_layout(coverage, keys, rank, config.lora.ranks)
    back = adapter_keys(trained, config.lora.targets, trained=scheme.frozen_side)
    fold = scheme.fold_rank(ranks, config.lora.rank)
    down = 0 if scheme.fresh else encoded_bytes(own, codec)
    folded = encoded_bytes(adapter_layout(coverage, keys, fold, config.lora.ranks), codec)
    counts = 0
    if config.privacy.dp.noise == "distributed" and config.privacy.secure is None:
        counts = adapter_layout(trained, back, rank, config.lora.ranks).total  # of holders, a byte an entry
    # Where a side is redrawn, one or the other: at most this.
    down = (max(down, folded) if scheme.frozen_side else down + folded) + counts
    return down, _upload(config, trained, rank, sparsity)


def _actors(config: RunConfig, need: int) -> int:
    """As many clients at once as cores and memory allow, and never more than there are."""
    if config.federation.engine != "flower":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_memory = (available_bytes() - SPARE_BYTES) // need
    if by_memory < 1:
        raise LegolmError(
            f"memory: one client needs {need / 1e9:.1f} GB beside {SPARE_BYTES / 1e9:.1f} GB for the server; "
            "lower train.micro_batch_tokens or train.max_length"
        )
    return max(1, min(cores // config.federation.threads, by_memory, len(config.clients)))
