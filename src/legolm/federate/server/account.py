"""What the noise of a run's rounds has cost, and how many rounds it may yet make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from legolm.adapter import Change
from legolm.aggregate import Scheme, Weighing
from legolm.config import RunConfig
from legolm.federate.server.members import Members
from legolm.privacy import Budget, gaussian, sampled_epsilon, within
from legolm.runs import RoundRecord, Spent


class Account:
    """Of a run with these members; without differential privacy there is nothing to account."""

    def __init__(self, config: RunConfig, members: Members) -> None:
        self._config, self._members, self._dp = config, members, config.privacy.dp
        there = range(1, config.federation.rounds + 1) if self._dp.level != "none" else ()
        self._asked = [frozenset(members.draw(config, number)) for number in there]

    def multiplier(self, done: Sequence[RoundRecord]) -> float | None:
        """The noise multiplier of the round after these, where it is everyone's. Raises `LegolmError` if spent."""
        return self._budget(done).multiplier if self._dp.level == "client" else self._dp.noise_multiplier

    def most(self, done: Sequence[RoundRecord]) -> int:
        """How many rounds the budget allows, those that are done included."""
        if self._dp.level == "client":
            return max(self._budget(done).rounds, len(done))
        if self._dp.epsilon is None:
            return len(self._asked)
        return max(within(self._dp.epsilon, lambda number: self._examples(done, number), len(self._asked)), len(done))

    def disturb(self, done: Sequence[RoundRecord], scheme: Scheme, weighing: Weighing, silent: Sequence[str]) -> None:
        """Add the noise of the round after these to its sum; `silent` were asked, and no update of theirs is added.

        They count as clients that learned nothing: D must not depend on what clients have.
        """
        if self._dp.level != "client":
            return
        members = self._members.at(len(done) + 1)
        for id in silent:
            weighing.add(id, Change({}, {}, 1, members.rank[id]), members.trains[id])
        if self._dp.noise == "central":
            std = self._budget(done).multiplier * self._dp.clip
            scheme.disturb(lambda shape: std * gaussian(shape))

    def charged(self, done: Sequence[RoundRecord], record: RoundRecord) -> RoundRecord:
        """The record of the round after these, with what all of them cost together.

        It is the cost of the client that was asked most, or whose examples were used most.
        """
        if self._dp.level == "none":
            return record
        spent = Spent(epsilon=0.0, delta=self._dp.delta, noise_multiplier=self.multiplier(done))
        record = record.model_copy(update={"privacy": spent})
        rounds, number = [*done, record], len(done) + 1
        epsilon = self._budget(rounds).epsilon(number) if self._dp.level == "client" else self._examples(rounds, number)
        return record.model_copy(update={"privacy": spent.model_copy(update={"epsilon": epsilon})})

    def _budget(self, rounds: Sequence[RoundRecord]) -> Budget:
        made = [one.privacy.noise_multiplier or 0.0 for one in rounds if one.privacy]
        return Budget(self._dp, self._who(rounds), made)

    def _who(self, rounds: Sequence[RoundRecord]) -> list[frozenset[str]]:
        """Who is asked in each round; of those that are done whoever their records name too, whatever is drawn now."""
        named = [{*one.accepted, *(refused.client for refused in one.refused)} for one in rounds]
        return [asked | (named[at] if at < len(named) else set()) for at, asked in enumerate(self._asked)]

    def _examples(self, rounds: Sequence[RoundRecord], number: int) -> float:
        """ε after `number` rounds. One that a client was asked in counts whole, and as its last one whose update came.

        Clients of whom none came are unknown, and do not count.
        """
        known = {id: one for record in rounds for id, one in record.train.items() if one.sampling_rate is not None}
        steps: dict[str, Counter[tuple[float, float]]] = {id: Counter() for id in known}
        for place, asked in enumerate(self._who(rounds)[:number]):
            there = rounds[place].train if place < len(rounds) else {}
            for id in asked & set(known):
                one = there.get(id, known[id])
                steps[id][one.noise_multiplier or 0.0, one.sampling_rate or 1.0] += self._config.train.steps
        alike = {tuple((z, rate, count) for (z, rate), count in sorted(one.items())) for one in steps.values()}
        return max((sampled_epsilon(one, self._dp.delta) for one in alike), default=0.0)
