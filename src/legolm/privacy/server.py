"""The server's side of one secure sum: it passes on what clients seal, adds what they mask, and opens only the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from legolm.errors import LegolmError
from legolm.models import Shape
from legolm.privacy import shamir
from legolm.privacy.atoms import Atom
from legolm.privacy.client import asked, commitment
from legolm.privacy.cohort import Advert, Cohort, Session, Structure, check, survivors_text
from legolm.privacy.masks import PairMasks, add_own, context, sent_hashes
from legolm.privacy.numbers import from_words
from legolm.privacy.primitives import KEY_BYTES, is_signed, public_of

MAX_SEAL = 16
"""Bytes that a seal adds."""


@dataclass(frozen=True)
class Opened:
    """An atom's sum over its survivors, whole numbers (int64) in the order of its places."""

    atom: Atom
    survivors: tuple[str, ...]
    total: np.ndarray


class SecureServer:
    """One sum in an LLM of this shape. `identities` is the roster, `structures` what each client holds.

    What it passes on is in one order, whoever came first: a run that goes on asks in the same bytes, whose replies are
    kept.
    """

    def __init__(
        self, session: Session, shape: Shape, structures: Mapping[str, Structure], identities: Mapping[str, str]
    ) -> None:
        self.session, self._shape, self._identities = session, shape, identities
        self._structures = structures
        self._adverts: dict[str, Advert] = {}
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._commitments: dict[str, list[str]] = {}
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, dict[tuple[str, tuple[str, ...] | None], bytes]] = {}

    # Keys

    def advert(self, client: str, advert: Advert) -> None:
        """Take a client's keys. Raises `LegolmError` for another's, and for signatures that do not fit the roster."""
        check(advert, self.session, self._identities)
        if advert.client != client or advert.held != self._structures[client].hash(self._shape):
            raise LegolmError(f"secure sum: {client} signed other keys or another block than its own")
        if self.session.weight == "equal" and advert.examples != 1:
            raise LegolmError(f"secure sum: {client} says examples {advert.examples}, and all count the same")
        self._adverts[client] = advert

    def close_keys(self) -> None:
        """Those who signed by now take part. Raises `LegolmError` where they are fewer than k."""
        if len(self._adverts) < self.session.k:
            raise LegolmError(f"secure sum: {len(self._adverts)} clients are there, and it needs {self.session.k}")
        named = {one.held: self._structures[id] for id, one in sorted(self._adverts.items())}
        self.structures = named
        self.cohort = Cohort(self.session, self._shape, list(self._adverts.values()), named)
        self._words = np.zeros(self.cohort.grid.layout.total, dtype=f"<u{self.cohort.bits // 8}")

    @property
    def adverts(self) -> list[Advert]:
        """Of all that take part."""
        return list(self.cohort.adverts.values())

    # Shares

    def shares(self, client: str, sealed: Mapping[str, bytes]) -> None:
        """Take what a client sealed for its neighbours. Raises `LegolmError` for others, and for other sizes."""
        mine = self.cohort.atoms_of(client)
        common = Counter(id for one in mine for id in self.cohort.ring(one).of(client) if id != client)
        sizes = {id: MAX_SEAL + shamir.SHARE_BYTES * (1 + count) for id, count in common.items()}
        if {id: len(content) for id, content in sealed.items()} != sizes:
            raise LegolmError(f"secure sum: {client} sealed shares for others than its neighbours, or of other sizes")
        self._sealed[client] = sealed

    def inbox(self, client: str) -> dict[str, bytes]:
        """What the others sealed for a client that sent its own shares."""
        return {id: one[client] for id, one in sorted(self._sealed.items()) if client in one}

    @property
    def there(self) -> list[str]:
        """Who sent shares."""
        return sorted(self._sealed)

    # Upload

    def upload(self, client: str, words: np.ndarray, commitments: Sequence[str]) -> None:
        """Add a client's masked numbers. Raises `LegolmError` for too many or too few of them."""
        mine = self.cohort.atoms_of(client, self._sealed)
        if len(words) != sum(len(one.places) for one in mine) or words.dtype != self._words.dtype:
            raise LegolmError(f"secure sum: {client} sent {len(words)} numbers; its atoms have others")
        if len(commitments) != len(mine) or client in self._commitments:
            raise LegolmError(
                f"secure sum: {client} sent hashes of {len(commitments)} seeds; {len(mine)} were asked for"
            )
        at = 0
        for one in mine:
            self._words[one.places] += words[at : at + len(one.places)]
            at += len(one.places)
        self._commitments[client] = list(commitments)

    @property
    def survivors(self) -> list[str]:
        """Who has uploaded."""
        return sorted(self._commitments)

    # Confirm

    def confirm(self, client: str, signature: bytes) -> None:
        """Take a survivor's signature of the survivors. Raises `LegolmError` for one that does not fit."""
        text = survivors_text(self.cohort, self.there, self.survivors)
        if client not in self._commitments or not is_signed(bytes.fromhex(self._identities[client]), signature, text):
            raise LegolmError(f"secure sum: {client} signed other survivors")
        self._signatures[client] = signature

    @property
    def signatures(self) -> dict[str, bytes]:
        """Of all who confirmed."""
        return dict(sorted(self._signatures.items()))

    def may_open(self) -> list[Atom]:
        """Atoms whose shares clients will give."""
        return self.cohort.opened(self._sealed, self._commitments, self._signatures)

    # Unmask

    @property
    def giving(self) -> list[str]:
        """Survivors who have shares that are needed."""
        opened = self.may_open()
        return [id for id in self.survivors if asked(self.cohort, id, self._sealed, self._commitments, opened)]

    def unmask(self, client: str, shares: Sequence[bytes]) -> None:
        """Take a client's shares. Raises `LegolmError` for more or fewer than were asked for."""
        wanted = asked(self.cohort, client, self._sealed, self._commitments, self.may_open())
        if len(shares) != len(wanted):
            raise LegolmError(f"secure sum: {client} gave {len(shares)} shares; {len(wanted)} were asked for")
        self._shares[client] = {
            (owner, None if atom is None else atom.holders): share
            for (owner, atom), share in zip(wanted, shares, strict=True)
        }

    def finish(self, about: bytes, received: np.ndarray) -> tuple[list[Opened], dict[tuple[str, ...], str]]:
        """The sums of all atoms that can be opened, and by holders why the others stay closed.

        `about` is what all were told alike, `received` (float32) what was sent at each place.
        """
        what = context(self.cohort, self._sealed, about, sent_hashes(self.cohort, received))
        opened, closed = [], dict[tuple[str, ...], str]()
        masks: dict[str, PairMasks] = {}
        may_open = {one.holders for one in self.may_open()}
        for atom in self.cohort.atoms:
            alive = [id for id in atom.holders if id in self._commitments]
            least = self.cohort.least(atom, self._sealed)
            if len(alive) < least:
                closed[atom.holders] = f"{len(alive)} of its {len(atom.holders)} holders sent it; {least} must"
                continue
            if not self.cohort.ring(atom).whole(self._commitments):
                closed[atom.holders] = "of those who are neighbours on it too many did not send it"
                continue
            if atom.holders not in may_open:
                closed[atom.holders] = "too few of its holders confirmed who had sent it"
                continue
            try:
                total = self._open(atom, alive, what, masks)
            except LegolmError as error:
                closed[atom.holders] = str(error)
            else:
                opened.append(Opened(atom, tuple(alive), total))
        return opened, closed

    def _open(self, atom: Atom, alive: Sequence[str], about: bytes, masks: dict[str, PairMasks]) -> np.ndarray:
        words = self._words[atom.places]
        for owner in alive:
            seed = self._secret(owner, atom)
            at = [one.holders for one in self.cohort.atoms_of(owner, self._sealed)].index(atom.holders)
            if seed is None or commitment(seed) != self._commitments[owner][at]:
                raise LegolmError(f"the shares of the seed of {owner} do not give it")
            add_own(words, seed, atom, self.cohort.bits, sign=-1)
        for owner in (id for id in atom.holders if id in self._sealed and id not in self._commitments):
            if owner not in masks:
                secret = self._secret(owner, None)
                if secret is None or public_of(secret).hex() != self.cohort.adverts[owner].mask_key:
                    raise LegolmError(f"the shares of the key of {owner} do not give it")
                masks[owner] = PairMasks(self.cohort, owner, secret)
            near = set(alive).intersection(self.cohort.ring(atom).of(owner))
            masks[owner].add(words, atom, near, about)  # as it would have: the others' then cancel
        return from_words(words)

    def _secret(self, owner: str, atom: Atom | None) -> bytes | None:
        """A seed, or a key, from its shares; None where they are too few or give none."""
        group, least = self.cohort.sharing(owner, atom)
        name, found = (owner, None if atom is None else atom.holders), {}
        for client in group:
            try:
                found[self.cohort.points[client]] = shamir.from_bytes(self._shares.get(client, {}).get(name, b""))
            except LegolmError:
                continue
        if len(found) < least:
            return None
        value = shamir.reconstruct(dict(list(found.items())[:least]))
        return value.to_bytes(KEY_BYTES, "big") if value < 1 << (8 * KEY_BYTES) else None
