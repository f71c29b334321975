"""From the records of a run's stages to the figures people look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from legolm.block import Block
from legolm.config import RunConfig

Record = dict[str, Any]


def summarize(
    config: RunConfig,
    blocks: Mapping[str, Block],
    block_of: Mapping[str, str],
    records: Sequence[Record],
    identity: Record,
    name: str,
    wall_s: float,
) -> Record:
    """The content of `summary.json`; losses are nats per answer token on test data, sets counting the same.

    `own` is a client's own test data, `others` the mean over the other clients'; `global` is `best_round`'s. The LLM's
    are those of the round that is the best for it, `llm.best_round`.
    """
    rounds = [record for record in records if record["stage"] == "round"]
    best, llm_best = best_round(rounds, "validation"), best_round(rounds, "llm_validation")
    first, last = scores_of(rounds[0]), scores_of(best)
    seconds = _seconds(records, blocks)
    return {
        "run": name,
        "run_id": identity["run"],
        "model": config.model,
        "seed": config.seed,
        "engine": config.federation.engine,
        "base_fingerprint": identity["base_fingerprint"],
        "machine": identity["machine"],
        "versions": identity["versions"],
        # A resumed run has stages that an earlier process did.
        "wall_s": max(wall_s, sum(seconds.values())),
        "seconds": seconds,
        "rounds": len(rounds) - 1,
        "best_round": best["round"],
        "blocks": [_block(block, block_of, rounds[1:]) for block in blocks.values()],
        "clients": [_client(id, block, records, first, last) for id, block in block_of.items()],
        "llm": {"best_round": llm_best["round"]}
        | {
            f"{measure}_{when}": _mean(record["llm"], measure)
            for when, record in (("before", rounds[0]), ("after", llm_best))
            for measure in ("loss", "exact_match")
        },
        "bytes_up_per_round": _traffic(rounds[1:], "up", block_of),
        "bytes_down_per_round": _traffic(rounds[1:], "down", block_of),
        "history": [_history(record) for record in rounds],
    }


def _client(
    id: str, block: str, records: Sequence[Record], before: Mapping[str, Record], best: Mapping[str, Record]
) -> Record:
    """`before` and `best` are `scores_of` those rounds."""
    phases = {"before": before[id], "global": best[id]}
    for record in records:
        if record["stage"] in ("local", "personal") and record["client"] == id:
            phases[record["stage"]] = record["scores"]
    entry: Record = {"id": id, "block": block}
    for suffix, measure in (("", "loss"), ("_exact_match", "exact_match")):
        entry[f"own{suffix}"] = {phase: scores[id][measure] for phase, scores in phases.items()}
        entry[f"others{suffix}"] = {phase: _others(scores, id, measure) for phase, scores in phases.items()}
    return entry


def _block(block: Block, block_of: Mapping[str, str], rounds: Sequence[Record]) -> Record:
    clients = [client for client, name in block_of.items() if name == block.name]
    coverage = block.coverage
    trained = [
        record["train"][client]["seconds"] for record in rounds for client in clients if client in record["train"]
    ]
    return {
        "name": block.name,
        "method": block.method,
        "sparsity": block.sparsity,
        "params": block.parameters,
        "file_bytes": block.file_bytes,
        "coverage": {
            "layers": len(coverage.layers),
            "kv_groups": len(coverage.groups[0]),
            "neurons": len(coverage.neurons[0]),
            "weights": 1 - coverage.sparsity,
            "hash": coverage.hash,
        },
        "clients": clients,
        "bytes_up_per_round": _traffic(rounds, "up", clients),
        "bytes_down_per_round": _traffic(rounds, "down", clients),
        "train_s_per_round": sum(trained) / len(trained) if trained else 0.0,
    }


def _history(record: Record) -> Record:
    return {
        "round": record["round"],
        "llm": {measure: _mean(record["llm"], measure) for measure in ("loss", "exact_match")},
        "clients": {
            id: {"own": scores[id]["loss"], "others": _others(scores, id, "loss")}
            for id, scores in scores_of(record).items()
        },
        "validation": record["validation"],
        "llm_validation": record["llm_validation"],
        "accepted": record["accepted"],
        "refused": record["refused"],
        "bytes_up": _traffic([record], "up", record["bytes"]),
        "bytes_down": _traffic([record], "down", record["bytes"]),
        "seconds": record["seconds"],
    }


def _seconds(records: Sequence[Record], blocks: Mapping[str, Block]) -> dict[str, float]:
    found = {"blocks": sum(float(block.details.get("seconds", 0.0)) for block in blocks.values())}
    found["before"] = records[0]["seconds"]
    # Clients share the stages outside the rounds: the last one's clock has seen the whole stage.
    for stage in ("local", "personal"):
        alone = [record["seconds"] for record in records if record["stage"] == stage]
        if alone:
            found[stage] = max(alone)
    found["rounds"] = sum(record["seconds"] for record in records if record["stage"] == "round" and record["round"])
    return found


def _traffic(rounds: Sequence[Record], way: str, clients: Iterable[str]) -> float:
    """Bytes of some clients in a round, mean over rounds."""
    wanted = set(clients)
    total: int = sum(count[way] for record in rounds for client, count in record["bytes"].items() if client in wanted)
    return total / max(len(rounds), 1)


def _mean(scores: Mapping[str, Record], measure: str) -> float:
    return sum(float(found[measure]) for found in scores.values()) / len(scores)


def _others(scores: Mapping[str, Record], client: str, measure: str) -> float | None:
    """Mean over the other clients' data; None for a client alone."""
    rest = {id: found for id, found in scores.items() if id != client}
    return _mean(rest, measure) if rest else None


def scores_of(record: Mapping[str, Any]) -> dict[str, dict[str, Record]]:
    """Each client's block's scores, by client, on every client's test data."""
    return {id: one["scores"] for one in record["held"] for id in one["clients"]}


def best_round(records: Iterable[Mapping[str, Any]], by: str) -> Mapping[str, Any]:
    """The round with the lowest loss on validation data, the earlier of equals."""
    return min((one for one in records if one["stage"] == "round"), key=lambda one: (one[by], one["round"]))
