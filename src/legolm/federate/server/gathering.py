"""What a round's clients send, added up: each one's update as it comes, or what a secure sum opens of them all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from legolm.aggregate import Scheme, Weighing
from legolm.config import RunConfig
from legolm.errors import UnusableRoundError
from legolm.federate.server.account import Account
from legolm.federate.server.begin import begin
from legolm.federate.server.dispatch import Dispatch, Order, Trained
from legolm.federate.server.members import LLM, Members
from legolm.federate.server.pace import Ages, first_to_end
from legolm.federate.server.replay import last_accepted, updates
from legolm.federate.server.secure import SecureRounds, moved
from legolm.federate.transport import Exchange
from legolm.runs import UPDATES, RunDir, Stages, Training
from legolm.system import Progress

AGAIN_S = 10.0
"""Before devices are asked again for want of updates."""


@dataclass
class Came:
    """What a round's clients sent: who was added, what they say of it, why others were not, kept updates.

    `closed` is the share of the entries that a secure sum did not open; it `stands`, with whatever it opened, where
    devices would not open another one of this round.
    """

    train: dict[str, Training] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    closed: float | None = None
    stands: bool = False


class Gathering:
    """Asks the clients of one round after the other; `secure` where only sums of their updates may be seen."""

    def __init__(
        self,
        folder: RunDir,
        config: RunConfig,
        members: Members,
        dispatch: Dispatch,
        stages: Stages,
        account: Account,
        secure: SecureRounds | None,
        progress: Progress,
    ) -> None:
        self._folder, self._config, self._members, self._dispatch = folder, config, members, dispatch
        self._stages, self._account, self._secure, self._progress = stages, account, secure, progress

    def weighing(self, scheme: Scheme) -> Weighing:
        """Where a round's changes are added, each at its weight."""
        config = self._config.aggregate
        if self._secure is not None:  # clients have weighed their changes themselves
            config = config.model_copy(update={"weight": "examples"})
        return Weighing(config, scheme)

    def round(
        self,
        number: int,
        asked: Mapping[str, int],
        drawn: Sequence[str],
        scheme: Scheme,
        weighing: Weighing,
        exchange: Exchange,
        partial: Path,
    ) -> Came:
        """Add to `weighing` what round `number` brings.

        `asked` has the round in which each client was asked, `drawn` are those of this round; `partial` is the folder
        of the round in the making. Raises `LegolmError` where too few came.
        """
        if self._secure is None:
            came = self._single(number, asked, scheme, weighing, exchange, partial)
        else:
            came = self._summed(number, drawn, scheme, weighing, exchange, self._secure)
        if not came.stands:
            self._check_enough(number, asked, came)
        return came

    def _single(
        self,
        number: int,
        asked: Mapping[str, int],
        scheme: Scheme,
        weighing: Weighing,
        exchange: Exchange,
        partial: Path,
    ) -> Came:
        """Each client's update by itself, added as it comes."""
        # Data at one place gives nobody's update.
        keeps = self._config.federation.keep_updates and list(asked) != [LLM]
        came, ages = Came(), Ages(self._config, self._members, self._stages.before(number))
        for one in self._updates(number, asked, came.train, scheme, exchange):
            if one.update is None:
                came.refused[one.client] = one.reason
                continue
            change = ages.discounted(one.client, one.asked, number, one.update.change)
            weighing.add(one.client, change, ages.coverage(one.client, one.asked))
            came.train[one.client] = one.update.training
            came.added.add(one.client)
            came.refused.pop(one.client, None)
            if keeps:
                (partial / UPDATES).mkdir(exist_ok=True)
                (partial / UPDATES / f"{one.client}.safetensors").write_bytes(one.reply)
                came.kept[one.client] = hashlib.sha256(one.reply).hexdigest()
        return came

    def _summed(
        self,
        number: int,
        drawn: Sequence[str],
        scheme: Scheme,
        weighing: Weighing,
        exchange: Exchange,
        secure: SecureRounds,
    ) -> Came:
        """What the clients' updates add up to, and nothing of one of them."""
        last, done = None, self._stages.before(number)
        if number > 1:
            before, after = (self._stages.state(self._folder.round(at)) for at in (number - 2, number - 1))
            last = moved(before, after, self._config.aggregate)
        order = Order(drawn, scheme, "round", number, last_accepted(done), self._account.multiplier(done))
        summed, trains = secure.round(order, last, exchange), self._members.at(number).trains
        for id, change in summed.changes.items():
            weighing.add(id, change, trains[id])
        scheme.only(summed.entries)
        stands = summed.asked and self._config.federation.engine == "deployment"
        return Came({}, dict(summed.refused), {}, set(summed.changes), summed.closed, stands)

    def _updates(
        self, number: int, asked: Mapping[str, int], train: Mapping[str, Training], scheme: Scheme, exchange: Exchange
    ) -> Iterator[Trained]:
        """What the clients return that were asked, as many as the buffer takes; `train` has those that were added.

        Devices of their own come back: while too few updates are there, the others are asked again.
        """
        federation, done = self._config.federation, self._stages.before(number)
        (least, why), noise = self._least(asked), self._account.multiplier(done)
        own, left = federation.engine == "deployment", list(asked)
        if federation.buffer is not None and not own:
            left = first_to_end(self._config, done, asked)

        def after(round: int) -> Scheme:
            if round == number - 1:
                return scheme
            return begin(self._config, self._members.llm, self._folder, self._stages.state(self._folder.round(round)))

        while True:
            now, why_not = {id: asked[id] for id in left}, dict[str, str]()
            came = updates(self._config, self._dispatch, done, number, now, after, exchange, noise)
            with closing(came):
                for one in came:
                    why_not[one.client] = one.reason
                    yield one
                    if federation.buffer is not None and len(train) >= federation.buffer:
                        return
            if not own or len(train) >= least:
                return
            left = [id for id in asked if id not in train]
            again = ", ".join(id + (f" ({why_not[id]})" if why_not.get(id) else "") for id in left)
            self._progress.note(f"round {number}: {len(train)} updates accepted, {why}; asked again: {again}")
            time.sleep(AGAIN_S)

    def _check_enough(self, number: int, asked: Mapping[str, int], came: Came) -> None:
        least, why = self._least(asked)
        if len(came.added) < least:
            reasons = "; ".join(f"{id}: {came.refused[id]}" for id in asked if id in came.refused)
            raise UnusableRoundError(f"round {number}: {len(came.added)} updates accepted, {why} ({reasons})")

    def _least(self, asked: Mapping[str, int]) -> tuple[int, str]:
        """How many updates a round needs, and why: with fewer, parts of the noise may be missing. Secure sums see to
        that themselves, entry by entry."""
        replies, dp = self._config.federation.min_replies, self._config.privacy.dp
        if self._secure is None and dp.noise == "distributed" and (least := len(asked) - dp.dropouts) > replies:
            return least, f"privacy.dp.dropouts is {dp.dropouts} of {len(asked)}"
        return min(replies, len(asked)), f"federation.min_replies is {replies}"
