"""A site: all that a client has. A device's own folder, or its part of a run folder in simulation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

from legolm.block import Block, llm_block, read_block
from legolm.config import DataConfig, Device, SiteConfig
from legolm.data import ClientData, Examples, client_data
from legolm.errors import PublicError
from legolm.federate.client.secure import Keeping
from legolm.models import resolve
from legolm.privacy import derive, identity_of
from legolm.runs import RunDir

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Profile:
    """What of its machine a client uses: where products run, and CPU threads."""

    device: Device = "auto"
    threads: int = 1


class Site(Protocol):
    """What a client has; the runtime needs nothing else."""

    def block(self) -> Block:
        """Its block."""

    def examples(self, split: Split) -> Sequence[Examples]:
        """Its own conversations of a split, in one or more parts."""

    def state(self) -> Path:
        """A folder for what it keeps between rounds; may not be there yet."""

    def profile(self) -> Profile:
        """How it works."""

    def prompts(self) -> DataConfig | None:
        """What decides the chat template; None where the block says it all."""

    def keeping(self) -> Keeping:
        """Its part in secure sums. Raises `LegolmError` where it has none."""


SiteOf = Callable[[str, str], Site]
"""(client, block's name) -> the site of this client that holds this block; raises `LegolmError` where there is none."""


def only(client: str, site: Site) -> SiteOf:
    """For a device: its own site, and nobody else's."""

    def site_of(asked: str, block: str) -> Site:
        if asked != client:
            raise PublicError(f"client {client}: has its own data only, and was asked for those of {asked!r}")
        return site

    return site_of


def simulated(run: RunDir) -> SiteOf:
    """All clients' sites in a run folder: data sources are read once, and each site shows its client's part."""
    config = run.site_config()
    identity = run.identity()

    @lru_cache(maxsize=1)
    def data() -> dict[str, ClientData]:
        return client_data(config)

    return lambda client, block: SimulatedSite(run, config, identity.base_fingerprint, client, block, data)


@dataclass(frozen=True)
class SimulatedSite:
    """One client's part of a run folder. `llm` is the client that holds the LLM and everyone's data, at one place.

    The LLM as a block may be scored at any client's: whoever simulates has it.
    """

    run: RunDir
    config: SiteConfig
    base_fingerprint: str
    client: str
    name: str
    data: Callable[[], dict[str, ClientData]]

    def block(self) -> Block:
        """Of this name in the run folder, or the LLM."""
        if self.name == "llm":
            return llm_block(resolve(self.config.model), self.base_fingerprint)
        return read_block(self.run.block(self.name))

    def examples(self, split: Split) -> Sequence[Examples]:
        """Its part; of the client `llm` everyone's."""
        data = self.data()
        return [getattr(one, split) for one in (data.values() if self.client == "llm" else (data[self.client],))]

    def state(self) -> Path:
        """`clients/ID/` of the run folder."""
        return self.run.client_state(self.client)

    def profile(self) -> Profile:
        """As the run's config says."""
        return Profile(self.config.device, self.config.federation.threads)

    def prompts(self) -> DataConfig | None:
        """As the run's config says: the LLM's tokenizer has none of it."""
        return self.config.data

    def keeping(self) -> Keeping:
        """Of an identity that all can make: in a simulation nothing is secret from who runs it. The rest as it is
        with devices, but that actors have no memory of their own: secrets of a sum are in a file of the owner's."""
        path, run = self.run.secrets / f"{self.client}.json", self.run.identity().run

        def write(content: bytes) -> None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)

        return Keeping(
            simulated_identity(run, self.client),
            simulated_roster(run, [one.id for one in self.config.clients]),
            lambda: path.read_bytes() if path.exists() else b"",
            write,
            self.run.secrets / f"{self.client}.opened",
        )


def simulated_identity(run: str, client: str) -> bytes:
    """The secret Ed25519 key of a simulated client."""
    return derive(run.encode(), b"simulated", client.encode())


@lru_cache(maxsize=4)
def _roster(run: str, clients: tuple[str, ...]) -> dict[str, str]:
    return {id: identity_of(simulated_identity(run, id)).hex() for id in clients}


def simulated_roster(run: str, clients: Sequence[str]) -> dict[str, str]:
    """The public keys of simulated clients, hexadecimal."""
    return _roster(run, tuple(clients))
