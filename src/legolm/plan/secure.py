"""What secure sums will not send, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from legolm.aggregate import make_scheme
from legolm.block import Coverage
from legolm.config import RunConfig
from legolm.federate.server import check_withheld, drawn, roster_of


def summed(
    config: RunConfig,
    coverages: Mapping[str, Coverage],
    members: Mapping[str, tuple[Coverage, int]],
) -> tuple[str, ...]:
    """The share of the entries that is never sent; `members` are those who may be asked (coverage, rank).

    `coverages` are the blocks'. Raises `LegolmError` above the limit.
    """
    secure, turns = config.privacy.secure, {one.id: one.blocks for one in config.clients if one.blocks}
    if secure is None:
        return ()

    roster_of(config, "")  # which names a device without an identity

    def at(id: str, number: int) -> tuple[Coverage, int]:
        coverage, rank = members[id]
        blocks = turns.get(id)
        return (coverages[blocks[(number - 1) % len(blocks)]], rank) if blocks else (coverage, rank)

    numbers = range(1, config.federation.rounds + 1)
    rounds = ([at(id, number) for id in drawn(config, number, members)] for number in numbers)
    share = check_withheld(config, make_scheme(config.aggregate).frozen_side, rounds)
    said = [
        f"Secure sums: {100 * share:.3g} % of the entries have fewer than {secure.least} holders and are never sent "
        "(if blocks overlap as planned); of the others the server learns sums. What clients say of their training is "
        "not told: its tokens and seconds stand at 0 in reports and comparisons."
    ]
    if config.evaluate.local_only or config.federation.personal_steps:
        said.append("Secure sums are of the rounds: what clients train alone the server sees, as this is a simulation.")
    return tuple(said)
