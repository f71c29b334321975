"""Who scores what.

In a simulation everyone may score on everyone's data: every distinct block and the LLM once. Where clients score their
own data only, each scores its own model, and the LLM is scored by the server on its own rows, or by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

from legolm.adapter import Tensors, tensors_hash
from legolm.aggregate import Scheme
from legolm.block import Block
from legolm.config import DataConfig, RunConfig
from legolm.data import Example, Examples, check_apart, is_starter, read_examples, with_system
from legolm.errors import LegolmError, UnusableRoundError
from legolm.federate.client import ClientRuntime, Keeping, Profile, only
from legolm.federate.client import Split as AnySplit
from legolm.federate.server.dispatch import Dispatch, Job, Split, checked_scores
from legolm.federate.server.members import LLM, Members, is_dense
from legolm.federate.server.protecting import Known
from legolm.federate.transport import Exchange, counted
from legolm.runs import Global, Held, Refusal, Score, Scores, Traffic, others_of

Set = tuple[str, Split]


class Scoring:
    """The jury of one run; `known` is what the LLM has after a scheme's rounds."""

    def __init__(self, config: RunConfig, members: Members, dispatch: Dispatch, known: Known) -> None:
        self._config, self._members, self._dispatch, self._known = config, members, dispatch, known

    def of_global(self, scheme: Scheme, exchange: Exchange, label: str) -> Global:
        """The LLM and the clients' blocks with the global update."""
        if self._config.evaluate.scores == "own":
            return self._own(scheme, exchange, label)
        return self._everyone(scheme, exchange, label)

    def sets_of(self, client: str) -> tuple[Set, ...]:
        """What the model of one client alone is scored on: test data, and last its own validation data."""
        asked = sorted((client, *self._others[client]), key=self._place.__getitem__)
        tests: list[Set] = [(id, "test") for id in asked]
        return (*tests, (client, "validation"))

    def _everyone(self, scheme: Scheme, exchange: Exchange, label: str) -> Global:
        """The LLM and every distinct block once, on all test data and on validation data.

        `validation` is the mean loss of the clients' blocks on their own, `llm_validation` the LLM's on all clients'.
        """
        clients, members, llm = self._members.clients, self._members, self._members.llm
        tests: tuple[Set, ...] = tuple((id, "test") for id in clients)
        rank = self._config.lora.rank
        quorum = self._quorum(scheme, exchange, label)
        whole = partial(self._known, scheme, quorum)
        # Who holds the whole LLM has its model, unless the server knows more than it sends.
        same = tensors_hash(whole()) == tensors_hash(scheme.adapter(llm.coverage, rank))
        alike: dict[tuple[str, int], list[str]] = {(LLM, rank if same else 0): []}
        for id in clients:
            name = LLM if is_dense(members.block[id]) else members.block[id].name
            alike.setdefault((name, members.rank[id]), []).append(id)
        jobs: list[Job] = []
        for (name, rank), ids in alike.items():
            block = llm if name == LLM else members.block[ids[0]]
            client, asked = (ids[0] if ids else clients[0]), (ids if jobs else clients)
            validation: tuple[Set, ...] = tuple((id, "validation") for id in asked)
            adapter = partial(scheme.adapter, block.coverage, rank) if jobs else whole
            jobs.append(Job(client, block, adapter, tests + validation))
        results, refused = self._scores(jobs, exchange, label)
        for index, reason in refused.items():
            job = jobs[index]
            raise UnusableRoundError(f"{label}: client {job.client}, block {job.block.name}: {reason}")

        # Once for all who hold the same: with each client's own copy a record would grow with their square.
        held = [
            Held(clients=ids, scores=by_client(jobs[index].sets, results[index]))
            for index, ids in enumerate(alike.values())
            if ids
        ]
        # In the jobs' order, not the replies': sums round by it.
        losses = [
            {id: score.loss for (id, split), score in zip(job.sets, results[index], strict=True) if split != "test"}
            for index, job in enumerate(jobs)
        ]
        own = [losses[index][id] for index, ids in enumerate(alike.values()) for id in ids]
        return Global(
            llm=by_client(jobs[0].sets, results[0]),
            held=held,
            validation=fmean(own),
            llm_validation=fmean(losses[0].values()),
            quorum=quorum,
        )

    def _quorum(self, scheme: Scheme, exchange: Exchange, label: str) -> float:
        """The one with which the LLM's loss on all clients' validation data is the lowest, the smaller of equals."""
        first, *others = self._known.quorums
        if not others:
            return first
        found: dict[str, tuple[float, Tensors]] = {}
        for quorum in self._known.quorums:
            factors = self._known(scheme, quorum)
            found.setdefault(tensors_hash(factors), (quorum, factors))
        tried = dict(found.values())
        if len(tried) == 1:
            return first
        clients = self._members.clients
        sets: tuple[Set, ...] = tuple((id, "validation") for id in clients)
        jobs = [Job(clients[0], self._members.llm, partial(tried.__getitem__, one), sets) for one in tried]
        results, refused = self._scores(jobs, exchange, f"{label}: quorum")
        if refused:
            raise UnusableRoundError(f"{label}: client {clients[0]}, the LLM: {next(iter(refused.values()))}")
        losses = {one: fmean(score.loss for score in results[index]) for index, one in enumerate(tried)}
        return min(losses, key=lambda one: (losses[one], one))

    def _own(self, scheme: Scheme, exchange: Exchange, label: str) -> Global:
        """Each client its own block on its own data; the LLM on the server's rows, where it has some.

        A client without scores is named and left out. Raises `LegolmError` where that is everybody.
        """
        members, factors = self._members, dict[tuple[str, int], Tensors]()
        jobs = []
        for id in members.clients:
            block, rank = members.block[id], members.rank[id]
            key = (block.coverage.hash, rank)
            if key not in factors:
                factors[key] = scheme.adapter(block.coverage, rank)
            jobs.append(Job(id, block, partial(factors.__getitem__, key), ((id, "test"), (id, "validation"))))
        sent: dict[str, Traffic] = {}
        results, refused = self._scores(jobs, counted(exchange, sent), label)
        unscored = [Refusal(client=jobs[index].client, reason=refused[index]) for index in sorted(refused)]
        if not results:
            said = "; ".join(f"{one.client}: {one.reason}" for one in unscored)
            raise UnusableRoundError(f"{label}: no client has scores ({said})")
        held = [
            Held(
                clients=[jobs[index].client],
                scores=by_client(jobs[index].sets, results[index]),
                validation=results[index][1].loss,
            )
            for index in sorted(results)
        ]
        found: Sequence[Score] = ()
        if self._config.evaluate.server_data is not None:
            adapter = partial(self._known, scheme)
            job = Job(LLM, members.llm, adapter, ((LLM, "test"), (LLM, "validation")))
            try:
                found = checked_scores(self._here.answer(self._dispatch.question(job)), job.sets)
            except LegolmError as error:
                raise LegolmError(f"{label}: the LLM on evaluate.server_data: {error}") from None
        return Global(
            llm=Scores({LLM: found[0]}) if found else None,
            held=held,
            unscored=unscored,
            validation=fmean(results[index][1].loss for index in sorted(results)),
            llm_validation=found[1].loss if found else None,
            scoring={id: sent[id] for id in members.clients if id in sent},
        )

    def _scores(
        self, jobs: Sequence[Job], exchange: Exchange, label: str
    ) -> tuple[Mapping[int, Sequence[Score]], Mapping[int, str]]:
        """The scores of the jobs by place, and why there are none of the others."""
        results: dict[int, Sequence[Score]] = {}
        return results, self._dispatch.score(jobs, exchange, label, results.__setitem__)

    @cached_property
    def _others(self) -> dict[str, list[str]]:
        return others_of(self._config)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {id: place for place, id in enumerate(self._members.clients)}

    @cached_property
    def _here(self) -> ClientRuntime:
        """The server as a client with the LLM and its own rows."""
        return ClientRuntime(only(LLM, _ServerSite(self._config, self._members.llm)))


def by_client(sets: Sequence[Set], scores: Sequence[Score]) -> Scores:
    """The scores on test data, by whose they are."""
    return Scores({id: score for (id, split), score in zip(sets, scores, strict=True) if split == "test"})


class _ServerSite:
    """What the server itself has: the LLM, and rows of its own, every second one to choose the round by."""

    def __init__(self, config: RunConfig, llm: Block) -> None:
        self._config, self._llm = config, llm

    def block(self) -> Block:
        return self._llm

    def examples(self, split: AnySplit) -> Sequence[Examples]:
        return (self._rows[split == "validation"],)

    @cached_property
    def _rows(self) -> tuple[Examples, Examples]:
        rows = server_examples(self._config)
        return Examples.of(rows[::2]), Examples.of(rows[1::2])

    def state(self) -> Path:
        raise LegolmError("the server keeps no client's state")

    def keeping(self) -> Keeping:
        raise LegolmError("the server takes no part in its own secure sums")

    def profile(self) -> Profile:
        return Profile(self._config.device, self._config.federation.threads)

    def prompts(self) -> DataConfig:
        return self._config.data


def server_examples(config: RunConfig, notes: list[str] | None = None) -> list[Example]:
    """The server's own rows (`evaluate.server_data`), none if it is not given. Raises `LegolmError` for bad ones.

    What there is to say of them is added to `notes`.
    """
    data, source = config.data, config.evaluate.server_data
    if source is None:
        return []
    if config.federation.engine != "deployment" and not is_starter(data.train):
        check_apart(data.train, source, "evaluate.server_data")
    rows = read_examples(source, data, "evaluate.server_data", notes)
    found = [with_system(example, data.system) for example in rows]
    if len(found) < 2:
        has = "no rows" if not found else "one row, and every second one chooses the round"
        raise LegolmError(f"evaluate.server_data: {source!r} has {has}; name files with examples, or take it out")
    return found
