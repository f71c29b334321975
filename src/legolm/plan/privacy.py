"""What differential privacy will cost a run, and whether anything is left to learn: before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from legolm.adapter import adapter_keys, adapter_layout
from legolm.aggregate import holders, make_scheme
from legolm.block import Coverage
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server import drawn
from legolm.privacy import Budget, noise_to_signal, sampled_epsilon, sampled_noise

HOPELESS = 10
"""Times as long as the signal can be: one direction of a million may still be seen, a model is not learned."""


def promised(
    config: RunConfig, members: Mapping[str, tuple[Coverage, int]], examples: Mapping[str, int]
) -> tuple[str, ...]:
    """(ε, δ) at the end of the rounds and noise beside signal; `members` are those who may be asked (coverage, rank).

    `examples` are numbers of examples, if anybody knows. Raises `LegolmError` for a budget that pays for no round.
    """
    dp = config.privacy.dp
    if dp.level == "none":
        return ()
    return (_of_clients(config, members),) if dp.level == "client" else _of_examples(config, members, examples)


def _of_clients(config: RunConfig, members: Mapping[str, tuple[Coverage, int]]) -> str:
    dp, total = config.privacy.dp, config.federation.rounds
    asked = [drawn(config, number, members) for number in range(1, total + 1)]
    budget = Budget(dp, asked)
    multiplier, rounds = budget.multiplier, budget.rounds
    if not rounds:
        raise LegolmError(
            f"privacy.dp.epsilon {dp.epsilon:g}: one round with noise_multiplier {multiplier:g} costs "
            f"{budget.epsilon(1):.3g}; raise either, or take noise_multiplier out"
        )
    keys = adapter_keys(_whole(members), config.lora.targets, trained=make_scheme(config.aggregate).frozen_side)
    entries = sum(holders(keys, list(members.values())).values())
    fewest = min(map(len, asked[:rounds]))
    said = (
        f"Differential privacy of one client: epsilon {budget.epsilon(rounds):.3g} at delta {dp.delta:g} after "
        f"{rounds} rounds, with noise multiplier {multiplier:.3g}."
    )
    if rounds < total:
        said += f" The run stops there: round {rounds + 1} of {total} would pass the budget, {dp.epsilon:g}."
    what = f"the clipped changes of {fewest} clients can be together, over {entries:,} entries"
    return f"{said} {_verdict(noise_to_signal(multiplier, entries, fewest), what, fewest, 'clients a round')}"


def _of_examples(
    config: RunConfig, members: Mapping[str, tuple[Coverage, int]], examples: Mapping[str, int]
) -> tuple[str, ...]:
    """Of the client with the fewest examples, whose batches have the largest share of them: it costs most."""
    dp, train = config.privacy.dp, config.train
    if not examples:
        return ("Differential privacy of examples: what it costs is known when devices say how many they have.",)
    id, count = min(examples.items(), key=lambda one: (one[1], one[0]))
    rate, each = min(1.0, train.batch_size / count), train.steps
    most = max(examples, key=lambda one: examples[one])
    if dp.delta >= 1 / examples[most]:
        raise LegolmError(
            f"privacy.dp.delta {dp.delta:g}: may show one of the {examples[most]} examples of client {most!r} whole; "
            "take a far smaller one"
        )
    total = config.federation.rounds * each
    multiplier = dp.noise_multiplier or sampled_noise(dp.epsilon or 0.0, dp.delta, rate, total)
    if dp.epsilon is not None and dp.noise_multiplier is not None:
        cost = sampled_epsilon([(multiplier, rate, each)], dp.delta)
        if cost > dp.epsilon:
            raise LegolmError(
                f"privacy.dp.epsilon {dp.epsilon:g}: one round with noise_multiplier {multiplier:g} costs {cost:.3g} "
                f"for client {id!r} of {count} examples; raise either, or take noise_multiplier out"
            )
    coverage, rank = members[id]
    keys = adapter_keys(coverage, config.lora.targets, trained=make_scheme(config.aggregate).frozen_side)
    entries, batch = adapter_layout(coverage, keys, rank, config.lora.ranks).total, min(train.batch_size, count)
    said = (
        f"Differential privacy of one example: epsilon {sampled_epsilon([(multiplier, rate, total)], dp.delta):.3g} at "
        f"delta {dp.delta:g} after {total} steps for {id}, who has the fewest ({count}), with noise multiplier "
        f"{multiplier:.3g}; a budget ends the run before it is passed."
    )
    what = f"the clipped gradients of {batch} examples can be together, over {entries:,} entries"
    return (f"{said} {_verdict(noise_to_signal(multiplier, entries, batch), what, batch, 'examples a step')}",)


def _whole(members: Mapping[str, tuple[Coverage, int]]) -> Coverage:
    return Coverage.full(next(iter(members.values()))[0].shape)


def _verdict(ratio: float, what: str, there: int, unit: str) -> str:
    said = f"The noise is {ratio:.3g} times as long as {what}"
    if ratio <= 1:
        return f"{said}."
    needed = f"; {ratio * there:,.0f} {unit} would make them equal"
    if ratio < HOPELESS:
        return f"{said}: more noise than signal{needed}."
    return f"{said}: hopeless, nothing will be learned{needed}, and so would fewer entries (lora.rank, lora.targets)."
