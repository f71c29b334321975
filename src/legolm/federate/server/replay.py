"""A round's updates, from clients or, to leave some of them out, as the run kept them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence

from legolm.aggregate import Scheme, Weighing
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate.server.begin import begin
from legolm.federate.server.dispatch import Dispatch, Order, Trained
from legolm.federate.server.gate import passed, usual_size
from legolm.federate.server.members import Members
from legolm.federate.transport import Exchange, Reply, Request
from legolm.runs import RoundRecord, RunDir, StageRecord, checked_state, rounds_of


def updates(
    config: RunConfig,
    dispatch: Dispatch,
    records: Sequence[StageRecord],
    number: int,
    clients: Sequence[str],
    scheme: Scheme,
    exchange: Exchange,
    noise: float | None = None,
) -> Iterator[Trained]:
    """What clients return for round `number`, checked and through the gate; `scheme` is the one after the round before.

    `noise` is the multiplier of what they add themselves.

    `records` are the run's so far: what is usual, and what each client last had.
    """
    before = [one for one in rounds_of(records) if one.round < number]
    usual = usual_size(before)
    order = Order(clients, scheme, "round", number, last_accepted(before), noise)
    for one in dispatch.train(order, exchange, f"round {number}: train"):
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

    def after(number: int) -> Scheme:
        return begin(config, members.llm, checked_state(folder.round(number), rounds[number]))

    scheme = after(0)
    for number in range(1, last + 1):
        weighing, trains = Weighing(config.aggregate, scheme), members.at(number).trains
        there = [id for id in rounds[number].accepted if id not in without]
        for one in updates(config, dispatch, records, number, there, after(number - 1), _kept(folder, rounds[number])):
            if one.update is None:
                raise LegolmError(f"round {number}: the kept update of {one.client}: {one.reason}")
            weighing.add(one.client, one.update.change, trains[one.client])
        weighing.finish()
    return scheme


def last_accepted(rounds: Iterable[RoundRecord]) -> dict[str, int]:
    """Each client's last round whose update was added."""
    return {id: record.round for record in rounds for id in record.accepted}


def _kept(folder: RunDir, record: RoundRecord) -> Exchange:
    """Answers of a round from its folder."""

    def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
        for index, request in enumerate(requests):
            path = folder.update(record.round, request.client)
            try:
                content = path.read_bytes()
            except OSError as error:
                yield Reply(index, error=str(error))
                continue
            same = hashlib.sha256(content).hexdigest() == record.updates.get(request.client)
            yield Reply(index, content) if same else Reply(index, error=f"{path} is not what the client sent")

    return exchange
