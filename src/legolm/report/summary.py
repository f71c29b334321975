"""From the records of a run's stages to the figures people look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from legolm.block import Block
from legolm.config import RunConfig
from legolm.runs import (
    BlockLoss,
    BlockSummary,
    ClientRecord,
    ClientSummary,
    Identity,
    KeptSummary,
    LlmScore,
    LlmSummary,
    Others,
    PassedRecord,
    PrivacySummary,
    RoundRecord,
    RoundSummary,
    Scores,
    Stage,
    StageRecord,
    Summary,
    best_round,
    clients_of,
    lacking,
    others_of,
    passed_of,
    rounds_of,
    traffic_alone,
    validations,
)

ALONE: tuple[Literal["local", "personal"], ...] = ("local", "personal")


def summarize(
    config: RunConfig,
    blocks: Mapping[str, Block],
    block_of: Mapping[str, str],
    records: Sequence[StageRecord],
    identity: Identity,
    name: str,
    wall_s: float,
    cut_s: float = 0.0,
) -> Summary:
    """The figures of a finished run called `name`; all its processes took `wall_s` seconds, `cut_s` of them for blocks.

    `blocks` are the cut blocks and the LLM by name, `block_of` the block's name of each client by id. `own` is a
    client's own test data, `others` the mean over `others_of` it, in every stage the same ones.
    """
    rounds = rounds_of(records)
    best, llm_best = best_round(rounds, "validation"), best_round(rounds, "llm_validation")
    others = others_of(config)
    stages: dict[Stage, dict[str, Scores]] = {"before": rounds[0].by_client()}
    if len(rounds) > 1:  # else each trained alone
        stages["global"] = best.by_client()
    for stage in ALONE:
        stages[stage] = {one.client: one.scores for one in clients_of(records, stage)}
    ended = {one.client: one for one in clients_of(records, "personal")}
    before, after = _llm(rounds[0]), _llm(llm_best)
    losses = validations(rounds, lacking(rounds))
    seconds = _seconds(records, blocks, cut_s)
    return Summary(
        run=name,
        run_id=identity.run,
        model=config.model,
        seed=config.seed,
        engine=config.federation.engine,
        base_fingerprint=identity.base_fingerprint,
        machine=identity.machine,
        versions=identity.versions,
        # Blocks may be cut by another run.
        wall_s=max(wall_s, sum(seconds.values())),
        seconds=seconds,
        scores=config.evaluate.scores,
        others=Others(asked=max(map(len, others.values())), there=len(block_of) - 1),
        rounds=len(rounds) - 1,
        changes=identity.changes,
        by_input=config.federation.personal == "by_input",
        best_round=best.round,
        privacy=_privacy(config, rounds),
        blocks=[_block(block, block_of, rounds) for block in blocks.values()],
        clients=[
            _client(
                id, block, stages, others[id], [one for one in passed_of(records) if one.client == id], ended.get(id)
            )
            for id, block in block_of.items()
        ],
        llm=LlmSummary(
            best_round=llm_best.round,
            loss_before=before.loss if before else None,
            loss_after=after.loss if after else None,
            exact_match_before=before.exact_match if before else None,
            exact_match_after=after.exact_match if after else None,
        ),
        bytes_up_per_round=_per_round(rounds, "up", block_of),
        bytes_down_per_round=_per_round(rounds, "down", block_of),
        bytes_scoring=sum(one.up + one.down for record in rounds for one in record.scoring.values()),
        bytes_alone=sum(one.up + one.down for one in traffic_alone(records).values()),
        history=[_history(record, others, losses.get(record.round)) for record in rounds],
    )


def _client(
    id: str,
    block: str,
    stages: Mapping[Stage, Mapping[str, Scores]],
    others: Sequence[str],
    passed: Sequence[PassedRecord],
    ended: ClientRecord | None,
) -> ClientSummary:
    own = {stage: found[id].root[id] for stage, found in stages.items() if id in found}
    all_rest = {stage: found[id].only(others) for stage, found in stages.items() if id in found}
    rest = {stage: scores for stage, scores in all_rest.items() if scores is not None}
    return ClientSummary(
        id=id,
        block=block,
        own={stage: score.loss for stage, score in own.items()},
        others={stage: scores.loss for stage, scores in rest.items()},
        own_exact_match={stage: score.exact_match for stage, score in own.items()},
        others_exact_match={stage: scores.exact_match for stage, scores in rest.items()},
        refused={one.phase: one.reason for one in passed},
        mixtures=ended.mixtures if ended else [],
        weights=ended.weights if ended else {},
    )


def _privacy(config: RunConfig, rounds: Sequence[RoundRecord]) -> PrivacySummary | None:
    dp, last = config.privacy.dp, rounds[-1].privacy
    if dp.level == "none" or last is None:
        return None
    return PrivacySummary(
        level=dp.level,
        noise=dp.noise,
        clip=dp.clip,
        noise_multiplier=last.noise_multiplier,
        epsilon=last.epsilon,
        delta=last.delta,
        budget=dp.epsilon,
        stopped=len(rounds) - 1 < config.federation.rounds,
    )


def _block(block: Block, block_of: Mapping[str, str], rounds: Sequence[RoundRecord]) -> BlockSummary:
    clients = [client for client, name in block_of.items() if name == block.name]
    coverage = block.coverage
    trained = [record.train[client].seconds for record in rounds for client in clients if client in record.train]
    return BlockSummary(
        name=block.name,
        method=block.method,
        sparsity=block.sparsity,
        params=block.parameters,
        file_bytes=block.file_bytes,
        coverage=KeptSummary(
            layers=len(coverage.layers),
            kv_groups=len(coverage.groups[0]),
            neurons=len(coverage.neurons[0]),
            weights=1 - block.sparsity,
            hash=coverage.hash,
        ),
        clients=clients,
        bytes_up_per_round=_per_round(rounds, "up", clients),
        bytes_down_per_round=_per_round(rounds, "down", clients),
        train_s_per_round=sum(trained) / len(trained) if trained else 0.0,
    )


def _history(record: RoundRecord, others: Mapping[str, Sequence[str]], validation: float | None) -> RoundSummary:
    clients = {}
    for id, scores in record.by_client().items():
        rest = scores.only(others[id])
        clients[id] = BlockLoss(own=scores.root[id].loss, others=rest.loss if rest else None)
    return RoundSummary(
        round=record.round,
        llm=_llm(record),
        clients=clients,
        validation=validation,
        llm_validation=record.llm_validation,
        accepted=record.accepted,
        refused=record.refused,
        unscored=record.unscored,
        bytes_up=sum(one.up for one in record.sent.values()),
        bytes_down=sum(one.down for one in record.sent.values()),
        epsilon=record.privacy.epsilon if record.privacy else None,
        seconds=record.seconds,
    )


def _llm(record: RoundRecord) -> LlmScore | None:
    scores = record.llm
    return LlmScore(loss=scores.loss, exact_match=scores.exact_match) if scores else None


def _seconds(records: Sequence[StageRecord], blocks: Mapping[str, Block], cut_s: float) -> dict[str, float]:
    rounds = rounds_of(records)
    took = [block.details.get("seconds") for block in blocks.values()]  # of a block from elsewhere it may be anything
    cut = sum(one for one in took if isinstance(one, int | float) and 0 <= one < 1e15)
    found = {"blocks": max(cut, cut_s)}  # with what was interrupted
    found["before"] = rounds[0].seconds
    # Clients share the stages outside the rounds: the last one's clock has seen the whole stage.
    for stage in ALONE:
        if alone := clients_of(records, stage):
            found[stage] = max(one.seconds for one in alone)
    found["rounds"] = sum(record.seconds for record in rounds[1:])
    return found


def _per_round(rounds: Sequence[RoundRecord], way: Literal["up", "down"], clients: Iterable[str]) -> float:
    """Bytes of some clients a round; what came before the first one is spread over them."""
    wanted = list(clients)
    sent: list[int] = [getattr(record.bytes[id], way) for record in rounds for id in wanted if id in record.bytes]
    return sum(sent) / max(len(rounds) - 1, 1)
