"""One secure sum from keys to the sum, with clients that go at some phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from legolm.block import Coverage
from legolm.models import Shape
from legolm.privacy import (
    Cohort,
    Opened,
    Secrets,
    SecureClient,
    SecureServer,
    Session,
    Structure,
    identity_of,
    sent_hashes,
)

SHAPE = Shape("llama", layers=2, hidden=4, neurons=6, kv_groups=2, queries_per_group=1, head_dim=2)
ABOUT = b"the same for all"


def session(**fields: object) -> Session:
    usual = {"run": "r", "round": 1, "k": 3, "targets": None, "rank": 2, "frozen_side": True}
    return Session.model_validate(usual | fields)


def nothing(cohort: Cohort) -> list[str]:
    """Hashes of what is sent, where that is zeros."""
    return sent_hashes(cohort, np.zeros(cohort.grid.layout.total, dtype=np.float32))


def secret(client: str) -> bytes:
    return client.encode().ljust(32, b".")


@dataclass
class Sum:
    """`gone` is the first phase that a client does not answer; `told` what it received, where that is another, and
    `said` what it is told that all received."""

    coverages: Mapping[str, Coverage]
    gone: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    said: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    session: Session = field(default_factory=session)
    rank: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.structures = {
            id: Structure.of(one, self.rank.get(id, self.session.rank)) for id, one in self.coverages.items()
        }
        self.identities = {id: identity_of(secret(id)).hex() for id in self.coverages}
        self.server = SecureServer(self.session, SHAPE, self.structures, self.identities)
        self.numbers: dict[str, np.ndarray] = {}

    def at(self, phase: str) -> list[str]:
        """Who answers this phase."""
        order = ["keys", "shares", "upload", "confirm", "unmask"]
        known = self.gone.items()
        return [
            id for id in self.clients if all(id != one or order.index(phase) < order.index(at) for one, at in known)
        ]

    @property
    def clients(self) -> list[str]:
        return list(self.coverages)

    def run(self, draws: np.random.Generator) -> tuple[list[Opened], dict[tuple[str, ...], str]]:
        clients: dict[str, SecureClient] = {}

        def again(id: str) -> SecureClient:
            """From what it kept, as another process would."""
            kept = Secrets.model_validate_json(clients[id].kept.model_dump_json())
            clients[id] = SecureClient(kept, secret(id), SHAPE)
            return clients[id]

        server = self.server
        for id in self.at("keys"):
            clients[id] = SecureClient.begin(self.session, id, secret(id), SHAPE, self.structures[id], 7)
            server.advert(id, clients[id].kept.own)
        server.close_keys()
        cohort = server.cohort
        taking = [id for id in cohort.adverts if cohort.atoms_of(id)]
        for id in (id for id in self.at("shares") if id in taking):
            server.shares(id, again(id).shares(server.adverts, server.structures, self.identities))
        self.received = draws.standard_normal(cohort.grid.layout.total).astype(np.float32)
        for id in (id for id in self.at("upload") if id in taking and cohort.atoms_of(id, server.there)):
            client = again(id)
            received = self.told.get(id, lambda values: values)(self.received)[cohort.places(id)]
            sent = self.said.get(id, lambda values: values)(self.received)
            opening = client.opening(cohort, server.there, ABOUT, received, sent_hashes(cohort, sent))
            self.numbers[id] = draws.integers(-99, 100, len(opening.order), dtype=np.int32)
            server.upload(id, *client.upload(client.cohort(), server.inbox(id), opening, self.numbers[id]))
            self.numbers[id] = self._whole(id, opening.order, self.numbers[id])
        for id in (id for id in self.at("confirm") if id in self.numbers):
            server.confirm(id, again(id).confirm(server.survivors))
        for id in (id for id in self.at("unmask") if id in server.giving):
            client = again(id)
            server.unmask(id, client.unmask(client.cohort(), server.signatures))
        return server.finish(ABOUT, self.received)

    def _whole(self, id: str, order: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """In the LLM's coordinates, zero elsewhere."""
        whole = np.zeros(self.server.cohort.grid.layout.total, dtype=np.int64)
        whole[self.server.cohort.places(id)[order]] = numbers
        return whole

    def plain(self, one: Opened) -> np.ndarray:
        """The sum in the clear."""
        return sum(self.numbers[id][one.atom.places] for id in one.survivors)
