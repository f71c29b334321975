"""A round's updates, from clients or, to leave some of them out, as the run kept them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence

from legolm.aggregate import Scheme, Weighing
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server.begin import begin
from legolm.federate.server.dispatch import Dispatch, Order, Trained
from legolm.federate.server.gate import passed, usual_size
from legolm.federate.server.members import Members
from legolm.federate.server.pace import Ages
from legolm.federate.transport import Exchange, Reply, Request
from legolm.runs import RoundRecord, RunDir, StageRecord, checked_state, rounds_of


def updates(
    config: RunConfig,
    dispatch: Dispatch,
    records: Sequence[StageRecord],
    number: int,
    asked: Mapping[str, int],
    after: Callable[[int], Scheme],
    exchange: Exchange,
    noise: float | None = None,
) -> Generator[Trained]:
    """What clients return for round `number`, checked and through the gate.

    `asked` has the round in which each of them was asked, `after` gives the scheme after a round. `records` are the
    run's so far: what is usual, and what each client last had. `noise` is the multiplier of what they add themselves.
    """
    before = [one for one in rounds_of(records) if one.round < number]
    usual = usual_size(before)
    orders = []
    for tag in sorted(set(asked.values())):
        clients, then = [id for id in asked if asked[id] == tag], (one for one in before if one.round < tag)
        orders.append(Order(clients, after(tag - 1), "round", tag, last_accepted(then), noise))
    for one in dispatch.train(orders, exchange, f"round {number}: train"):
        yield passed(one, usual, config)


def replay(
    folder: RunDir,
    config: RunConfig,
    members: Members,
    dispatch: Dispatch,
    records: Sequence[StageRecord],
    last: int,
    without: Collection[str],
) -> Scheme:
    """The scheme after round `last` had the kept updates of `without` not been added.

    The others' updates are what they were: what they trained from had the left-out ones in it. Raises `LegolmError`
    where a kept update is missing or broken.
    """
    rounds = {record.round: record for record in rounds_of(records)}
    ages = Ages(config, members, rounds.values())

    def after(number: int) -> Scheme:
        return begin(config, members.llm, folder, checked_state(folder.round(number), rounds[number]))

    scheme = after(0)
    for number in range(1, last + 1):
        weighing, record = Weighing(config.aggregate, scheme), rounds[number]
        asked = {id: record.tags.get(id, number) for id in record.accepted if id not in without}
        for one in updates(config, dispatch, records, number, asked, after, _kept(folder, record)):
            if one.update is None:
                raise LegolmError(f"round {number}: the kept update of {one.client}: {one.reason}")
            change = ages.discounted(one.client, one.asked, number, one.update.change)
            weighing.add(one.client, change, ages.coverage(one.client, one.asked))
        weighing.finish()
    return scheme


def last_accepted(rounds: Iterable[RoundRecord]) -> dict[str, int]:
    """The round in which each client was asked for the last update of its that was added."""
    return {id: record.tags.get(id, record.round) for record in rounds for id in record.accepted}


def _kept(folder: RunDir, record: RoundRecord) -> Exchange:
    """Answers of a round from its folder."""

    def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        for index, request in enumerate(requests):
            yield Reply(index, read_kept(folder, record, request.client))

    return exchange


def read_kept(folder: RunDir, record: RoundRecord, client: str) -> bytes:
    """The kept update of a client. Raises `LegolmError` when it is lost or not what the client sent."""
    path, fault = folder.update(record.round, client), "is not what the client sent"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == record.updates.get(client):
            return content
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    raise LegolmError(
        f"{path}: the kept update of {client} {fault}; restore it, or remove {folder.round(record.round)} and run "
        "again with --resume, which makes this round and all after it again"
    )
