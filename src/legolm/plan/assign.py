"""Which client gets which block, and how it trains it within its device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from legolm.config import ClientConfig, Precision, RunConfig
from legolm.errors import LegolmError
from legolm.models import choose_precision
from legolm.plan.needs import Settings, Trainee, leaner, settings_of, training_bytes


@dataclass(frozen=True)
class Fit:
    """A client's block (of several the first), how it trains, and the peak memory (bytes) that this takes."""

    block: str
    settings: Settings
    memory: int


TraineeOf = Callable[[ClientConfig, str], Trainee]
"""(client, block's name) -> what it would train."""


def assign(
    config: RunConfig, batches: Mapping[str, Sequence[int]], parameters: Mapping[str, int], trainee_of: TraineeOf
) -> tuple[Precision, dict[str, Fit]]:
    """The run's precision and each client's block and settings.

    The block is as configured, or the largest that the profile's memory can hold; the settings are the fastest that
    fit. `batches` are the lengths of each client's longest batch. `precision: auto` is the one that is fast here, but
    bf16 where a client's memory fits nothing else. Raises `LegolmError` for a client whose memory fits nothing, with
    what would.
    """
    precision = choose_precision(config.precision, config.device)
    open_ = config.precision == "auto" and precision != "bf16"
    for tried in (precision, "bf16") if open_ else (precision,):
        found = {one.id: _fit(config, one, batches[one.id], parameters, trainee_of, tried) for one in config.clients}
        fits = {id: fit for id, fit in found.items() if fit is not None}
        if len(fits) == len(found):
            return tried, fits
    lacking = next(one for one in config.clients if found[one.id] is None)
    raise LegolmError(_refusal(config, lacking, batches[lacking.id], parameters, trainee_of, tried))


def _fit(
    config: RunConfig,
    client: ClientConfig,
    lengths: Sequence[int],
    parameters: Mapping[str, int],
    trainee_of: TraineeOf,
    precision: Precision,
) -> Fit | None:
    largest_first = sorted(parameters, key=lambda name: -parameters[name])
    named = client.named
    ways = leaner(config.train, lengths) if client.profile else [settings_of(config.train)]
    ways, budget = list(ways), client.profile.memory_mb * 1e6 if client.profile else math.inf
    for held in [named] if named else [[name] for name in largest_first]:
        trainees = [trainee_of(client, name) for name in held]
        for settings in ways:
            memory = max(training_bytes(one, lengths, settings, precision) for one in trainees)
            if memory <= budget:
                return Fit(held[0], settings, memory)
    return None


def _refusal(
    config: RunConfig,
    client: ClientConfig,
    lengths: Sequence[int],
    parameters: Mapping[str, int],
    trainee_of: TraineeOf,
    precision: Precision,
) -> str:
    """Why a client's memory fits nothing, and what would fit."""
    assert client.profile is not None
    named = client.named

    def least(name: str, precision: Precision = precision) -> int:
        """Bytes with the leanest settings."""
        own = client.model_copy(update={"layers": client.layers if name == client.block else None})
        return min(
            training_bytes(trainee_of(own, name), lengths, one, precision) for one in leaner(config.train, lengths)
        )

    needs = {name: least(name) for name in parameters}
    smallest = min(needs, key=lambda name: needs[name])
    asked = max(named or [smallest], key=lambda name: needs[name])
    budget = client.profile.memory_mb * 1e6
    fitting = [name for name in needs if needs[name] <= budget]
    ways = [f"block {max(fitting, key=lambda name: parameters[name])!r} fits"] if fitting else []
    if precision == "fp32" and all(least(name, "bf16") <= budget for name in named or [smallest]):
        ways.append("precision bf16 fits")
    if not ways:
        also = "" if asked == smallest else f", or {_mb(needs[smallest])} and block {smallest!r}"
        ways.append(f"give it {_mb(needs[asked])}{also}, add a smaller block, or lower train.max_length")
    what = f"block {asked!r}" if named else f"the smallest block, {asked!r},"
    return (
        f"clients: {client.id!r} has {client.profile.memory_mb:,.15g} MB (profile.memory_mb); {what} needs "
        f"{_mb(needs[asked])} even with one example at a time, gradient checkpointing where it helps, and {precision}; "
        f"{' or '.join(ways)}"
    )


def _mb(count: int) -> str:
    return f"{math.ceil(count / 1e6):,} MB"
