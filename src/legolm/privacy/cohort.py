"""Who takes part in one secure sum, with what: public, the same for the server and for every client."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from legolm.adapter import Flat, Layout, adapter_keys, adapter_layout, slice_factors
from legolm.block import Coverage
from legolm.errors import PublicError
from legolm.models import Shape
from legolm.privacy.atoms import Atom, atoms, threshold
from legolm.privacy.neighbours import Ring, opens, ring
from legolm.privacy.numbers import bits_for
from legolm.privacy.primitives import KEY_BYTES, Agreeing, is_signed, joined, sign

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Name = Annotated[str, Field(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
MAX_CLIENTS = 10_000


class Public(BaseModel):
    """What everybody may know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Session(Public):
    """One secure sum: of which round, at which attempt, over which factors, and with how many survivors an atom opens.

    Factors are on `targets`, of rank `rank` at most (`ranks`: of single modules), with `frozen_side` those that train
    only. Where clients add noise, an atom may lose `dropouts` of those who sent shares, and no more. `rows` is a hash
    of how devices are to read their rows. All of it is in what clients sign and in what masks are made of.
    """

    run: Name
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=0)] = 0
    k: Annotated[int, Field(ge=3, le=MAX_CLIENTS)]
    targets: list[str] | None
    rank: Annotated[int, Field(ge=1)]
    ranks: dict[str, int] = {}
    frozen_side: bool
    weight: Literal["examples", "equal", "capped"] = "equal"
    weight_cap: float = 1.0
    dropouts: Annotated[int, Field(ge=0, le=MAX_CLIENTS)] | None = None
    rows: Hex32 | Literal[""] = ""

    def least(self, there: int) -> int:
        """So many of an atom's holders must have sent it, where so many sent shares."""
        return self.k if self.dropouts is None else max(self.k, there - self.dropouts)

    def parts(self, there: int) -> int:
        """Whose noise is enough: of the `least` those who are no colluders, who know their own. Two, at least."""
        return self.least(there) - (self.k - 2)

    @property
    def text(self) -> bytes:
        """Another one for any other session."""
        return self.model_dump_json().encode()


class Structure(Public):
    """Which factors' entries a client's change has: layers of the LLM, KV groups and neurons of each as bits, rank."""

    rank: Annotated[int, Field(ge=1)]
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    neurons: tuple[str, ...]

    @staticmethod
    def of(coverage: Coverage, rank: int) -> Structure:
        """Of what a client trains. Bit masks are of weights, not of factors."""
        shape = coverage.shape
        return Structure(
            rank=rank,
            layers=coverage.layers,
            groups=tuple(_bits(kept, shape.kv_groups) for kept in coverage.groups),
            neurons=tuple(_bits(kept, shape.neurons) for kept in coverage.neurons),
        )

    def coverage(self, shape: Shape) -> Coverage:
        """In an LLM of this shape. Raises `LegolmError` for what cannot be."""
        groups = tuple(_kept(one, shape.kv_groups) for one in self.groups)
        return Coverage(shape, self.layers, groups, tuple(_kept(one, shape.neurons) for one in self.neurons))

    def hash(self, shape: Shape) -> str:
        """SHA-256 of it and of the LLM's shape."""
        text = self.model_dump_json() + json.dumps(asdict(shape), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Advert(Public):
    """What a client begins with, signed by its identity: keys for this sum only, what it holds, its examples.

    `seal_key` and `mask_key` are X25519's, hexadecimal. `examples` is 1 where all count the same.
    """

    client: Name
    seal_key: Hex32
    mask_key: Hex32
    held: Hex32
    examples: Annotated[int, Field(ge=1, le=10**9)]
    signature: Hex64 = "0" * 128

    def content(self, session: Session) -> bytes:
        """What is signed."""
        unsigned = self.model_copy(update={"signature": "0" * 128})
        return joined(b"legolm keys", session.text, unsigned.model_dump_json().encode())

    def signed(self, session: Session, identity: bytes) -> Advert:
        """With the signature of this secret identity."""
        return self.model_copy(update={"signature": sign(identity, self.content(session)).hex()})


@dataclass(frozen=True, eq=False)
class Grid:
    """All trained factors of an LLM in one flat vector: where each is, and the rank row of each entry.

    Rank rows are numbered through all factors, the session's rank for each.
    """

    layout: Layout
    rows: np.ndarray
    rank: int

    @property
    def row_count(self) -> int:
        """Of all factors."""
        return self.rank * len(self.layout.shapes)

    def places(self, coverage: Coverage, rank: int) -> np.ndarray:
        """Where each entry of a block's change (`adapter_layout`) is: int64."""
        flat = Flat(torch.arange(self.layout.total), self.layout)
        part = slice_factors(coverage, dict(flat), rank)
        return torch.cat([part[key].flatten() for key in sorted(part)]).numpy()


@lru_cache(maxsize=4)
def _grid(shape: Shape, frozen_side: bool, targets: tuple[str, ...] | None, rank: int, ranks: str) -> Grid:
    full = Coverage.full(shape)
    layout = adapter_layout(full, adapter_keys(full, targets, trained=frozen_side), rank, json.loads(ranks))
    rows = []
    for number, (key, (height, width)) in enumerate(layout.shapes.items()):
        along = np.repeat(np.arange(height), width) if key.endswith(".A") else np.tile(np.arange(width), height)
        rows.append(number * rank + along)
    return Grid(layout, np.concatenate(rows).astype(np.int32), rank)


def grid_of(session: Session, shape: Shape) -> Grid:
    """The vector that sums of this session are in."""
    targets = None if session.targets is None else tuple(session.targets)
    return _grid(shape, session.frozen_side, targets, session.rank, json.dumps(session.ranks, sort_keys=True))


def withheld(grid: Grid, shape: Shape, structures: Mapping[Structure, int], k: int) -> float:
    """Share of the held entries with fewer than k holders, where so many clients have each structure."""
    holders = np.zeros(grid.layout.total, dtype=np.int64)
    for one, clients in structures.items():
        holders[grid.places(one.coverage(shape), one.rank)] += clients
    held = holders[holders > 0]
    return float((held < k).mean()) if len(held) else 1.0


@lru_cache(maxsize=4)
def _cut(
    grid: Grid, shape: Shape, members: tuple[tuple[str, Structure], ...]
) -> tuple[list[Atom], dict[str, np.ndarray]]:
    """All atoms, and what each client holds: one array for all that hold the same."""
    alike = {one: grid.places(one.coverage(shape), one.rank) for one in dict.fromkeys(one for _, one in members)}
    held = {client: alike[one] for client, one in members}
    return atoms(grid.layout.total, held), held


@lru_cache(maxsize=8)
def _order(
    grid: Grid,
    shape: Shape,
    structure: Structure,
    chosen: tuple[tuple[str, ...], ...],
    members: tuple[tuple[str, Structure], ...],
) -> np.ndarray:
    """Where the entries of these atoms, one after the other, are in the change of a client of this structure."""
    found = {one.holders: one for one in _cut(grid, shape, members)[0]}
    inverse = np.zeros(grid.layout.total, dtype=np.int64)
    places = grid.places(structure.coverage(shape), structure.rank)
    inverse[places] = np.arange(len(places))
    order: np.ndarray = inverse[np.concatenate([found[one].places for one in chosen])]
    return order


class Cohort:
    """The clients of a session by what they signed, and the atoms that enough of them hold.

    Whose signatures fit (`check`) was looked at. Raises `LegolmError` for a structure that was not signed.
    """

    def __init__(
        self,
        session: Session,
        shape: Shape,
        adverts: Collection[Advert],
        structures: Mapping[str, Structure],
    ) -> None:
        self.session, self.shape = session, shape
        self.adverts = {one.client: one for one in sorted(adverts, key=lambda one: one.client)}
        if len(self.adverts) < len(adverts):
            raise PublicError("secure sum: a client is there twice")
        for one in adverts:
            if one.held not in structures:
                raise PublicError(f"secure sum: what {one.client} holds was not told")
        for name, structure in structures.items():
            if structure.hash(shape) != name or structure.rank > session.rank:
                raise PublicError("secure sum: what a client holds is not what it signed")
        self._members = tuple((id, structures[one.held]) for id, one in self.adverts.items())
        self.grid = grid_of(session, shape)
        self.all_atoms, self._held = _cut(self.grid, shape, self._members)
        self.atoms = [one for one in self.all_atoms if len(one.holders) >= session.k]
        self.bits = bits_for(max((len(one.holders) for one in self.atoms), default=1))
        self._rings: dict[tuple[str, ...], Ring] = {}
        self._peers: dict[str, frozenset[str]] = {}
        self._neighbours: dict[str, list[str]] = {}

    @cached_property
    def digest(self) -> bytes:
        """Of the session and of all that was signed."""
        return hashlib.sha256(
            joined(self.session.text, *(one.model_dump_json().encode() for one in self.adverts.values()))
        ).digest()

    @cached_property
    def _atoms_by_client(self) -> dict[str, list[Atom]]:
        found: dict[str, list[Atom]] = {}
        for one in self.atoms:
            for client in one.holders:
                found.setdefault(client, []).append(one)
        return found

    @cached_property
    def points(self) -> dict[str, int]:
        """Where in the field each client's shares are."""
        return {id: number for number, id in enumerate(self.adverts, 1)}

    def atoms_of(self, client: str, there: Collection[str] | None = None) -> list[Atom]:
        """Those of a client; with `there` those that enough of these hold."""
        mine = self._atoms_by_client.get(client, [])
        if there is None:
            return list(mine)
        return [one for one in mine if len(set(there).intersection(one.holders)) >= self.session.k]

    def least(self, atom: Atom, there: Collection[str]) -> int:
        """How many of its holders must have sent an atom, where these sent shares."""
        return self.session.least(len(set(there).intersection(atom.holders)))

    @cached_property
    def _turns(self) -> dict[str, bytes]:
        """An order of the clients that nobody planned, for no client knows the others' keys before it signs its own.
        Who tries many keys can choose it; what is assumed of `colluders` does not rest on it (`neighbours`)."""
        return {id: hashlib.sha256(joined(self.digest, id.encode())).digest() for id in self.adverts}

    def ring(self, atom: Atom) -> Ring:
        """Which of an atom's holders are neighbours."""
        found = self._rings.get(atom.holders)
        if found is None:
            found = self._rings[atom.holders] = ring(atom.holders, self._turns, self.session.k)
        return found

    def peers(self, client: str) -> frozenset[str]:
        """Who has an atom in common with a client, itself too."""
        held = self.adverts[client].held  # who holds the same has the same atoms
        if held not in self._peers:
            self._peers[held] = frozenset(other for one in self.atoms_of(client) for other in one.holders)
        return self._peers[held]

    def neighbours(self, client: str) -> list[str]:
        """Who is a client's neighbour on some atom, itself too: they have the shares of its key."""
        if client not in self._neighbours:
            found = {other for one in self.atoms_of(client) for other in self.ring(one).of(client)}
            self._neighbours[client] = sorted(found)
        return self._neighbours[client]

    def sharing(self, client: str, atom: Atom | None) -> tuple[list[str], int]:
        """Who has shares of a client's seed of an atom, or of its key (None), itself too, and how many give it."""
        group = self.neighbours(client) if atom is None else self.ring(atom).of(client)
        holders = self.peers(client) if atom is None else atom.holders
        return group, opens(len(group) - 1, len(holders), self.session.k)

    def places(self, client: str) -> np.ndarray:
        """Where each entry of its change is."""
        return self._held[client]

    def order(self, client: str, chosen: Collection[Atom]) -> np.ndarray:
        """Where the entries of these atoms, one after the other, are in this client's change."""
        structure = dict(self._members)[client]
        return _order(self.grid, self.shape, structure, tuple(one.holders for one in chosen), self._members)

    def opened(self, there: Collection[str], survivors: Collection[str], signers: Collection[str]) -> list[Atom]:
        """Atoms that may be opened: enough of those who may have sent them did, and of those who have the shares agree
        on who did.

        For each holder those are all its peers, whose neighbours have shares of its key, and not the atom's holders
        alone: a server that says otherwise to others would get the key from them and the seed of a small atom from
        these. And all honest survivors must be one piece of an atom's ring, or there were several sums.
        """
        sent, agree = set(survivors), set(signers)
        trusted = {peers: _enough(peers, agree, self.session.k) for peers in {self.peers(one) for one in there}}
        doubted = {one for one in there if not trusted[self.peers(one)]}
        return [
            one
            for one in self.atoms
            if len(sent.intersection(one.holders)) >= self.least(one, there)
            and _enough(one.holders, agree, self.session.k)
            and doubted.isdisjoint(one.holders)
            and self.ring(one).whole(sent)
        ]


def check(advert: Advert, session: Session, identities: Mapping[str, str]) -> None:
    """Raise `LegolmError` unless the advert is signed by its client.

    `identities` is the roster: Ed25519 public keys by client, hexadecimal.
    """
    identity = identities.get(advert.client)
    if identity is None:
        raise PublicError(f"secure sum: client {advert.client} is not in the roster of identities")
    if not is_signed(bytes.fromhex(identity), bytes.fromhex(advert.signature), advert.content(session)):
        raise PublicError(
            f"secure sum: the signature of client {advert.client} does not fit its identity in the roster; take the "
            "roster of this federation"
        )
    alone = Agreeing(secrets.token_bytes(KEY_BYTES))
    for key in (advert.seal_key, advert.mask_key):  # one that agrees with everybody would stop all others
        alone.with_(bytes.fromhex(key))


def survivors_text(cohort: Cohort, there: Collection[str], survivors: Collection[str]) -> bytes:
    """What a client signs when it agrees that of those who sent shares these have sent their sums.

    With the keys of all: a session that is begun again has others, and what was signed in it before tells nothing.
    """
    named = (joined(*(one.encode() for one in sorted(ids))) for ids in (there, survivors))
    return joined(b"legolm survivors", cohort.digest, *named)


def _enough(group: Collection[str], agree: set[str], k: int) -> bool:
    return len(agree.intersection(group)) >= threshold(len(group), k)


def _bits(kept: tuple[int, ...], size: int) -> str:
    bits = np.zeros(size, dtype=bool)
    bits[list(kept)] = True
    return np.packbits(bits).tobytes().hex()


def _kept(bits: str, size: int) -> tuple[int, ...]:
    if len(bits) != 2 * ((size + 7) // 8) or not set(bits) <= set("0123456789abcdef"):
        raise PublicError("secure sum: what a client holds does not fit the LLM")
    found = np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)))
    return tuple(found.tolist())
