"""A client's side of one secure sum (Bonawitz et al., Practical Secure Aggregation, CCS 2017, by atom).

keys → shares → upload → confirm → unmask, each once and in this order; whoever asks otherwise gets an error.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from legolm.errors import LegolmError, PublicError
from legolm.models import Shape
from legolm.privacy import shamir
from legolm.privacy.atoms import Atom
from legolm.privacy.cohort import Advert, Cohort, Hex32, Session, Structure, check, survivors_text
from legolm.privacy.masks import PairMasks, add_own, context, parts, sent_hash
from legolm.privacy.numbers import to_words
from legolm.privacy.primitives import KEY_BYTES, Agreeing, derive, identity_of, is_signed, public_of, seal, sign, unseal

Phase = Literal["keys", "shares", "upload", "confirm", "unmask"]
PHASES: tuple[Phase, ...] = ("keys", "shares", "upload", "confirm", "unmask")
NOTHING = b"\xff" * shamir.SHARE_BYTES
"""In place of a share that a client cannot give."""


class Secrets(BaseModel):
    """What a client keeps of one sum between its phases. It holds keys: in memory, or where nobody else reads."""

    model_config = ConfigDict(extra="forbid")

    session: Session
    client: str
    done: Phase = "keys"
    seal_secret: Hex32
    mask_secret: Hex32
    own: Advert
    structures: dict[Hex32, Structure]
    identities: dict[str, Hex32] = {}
    adverts: list[Advert] = []
    seeds: list[Hex32] = []
    own_shares: Annotated[str, Field(pattern=r"^[0-9a-f]*$")] = ""
    sealed: dict[str, str] = {}
    there: list[str] = []
    survivors: list[str] = []


class SecureClient:
    """One client of one sum in an LLM of this shape; `identity` is its secret Ed25519 key."""

    def __init__(self, kept: Secrets, identity: bytes, shape: Shape) -> None:
        self.kept, self._identity, self._shape = kept, identity, shape
        self._sealing = Agreeing(bytes.fromhex(kept.seal_secret))

    @staticmethod
    def begin(
        session: Session, client: str, identity: bytes, shape: Shape, structure: Structure, examples: int
    ) -> SecureClient:
        """Phase *keys*: fresh ones, signed (`kept.own`)."""
        sealing, masking = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        held = structure.hash(shape)
        advert = Advert(
            client=client,
            seal_key=public_of(sealing).hex(),
            mask_key=public_of(masking).hex(),
            held=held,
            examples=1 if session.weight == "equal" else examples,
        ).signed(session, identity)
        kept = Secrets(
            session=session,
            client=client,
            seal_secret=sealing.hex(),
            mask_secret=masking.hex(),
            own=advert,
            structures={held: structure},
        )
        return SecureClient(kept, identity, shape)

    def cohort(self) -> Cohort:
        """Who takes part, once that was told."""
        kept = self.kept
        return Cohort(kept.session, self._shape, kept.adverts, kept.structures)

    def shares(
        self, adverts: Sequence[Advert], structures: Mapping[str, Structure], identities: Mapping[str, str]
    ) -> dict[str, bytes]:
        """Phase *shares*: for each neighbour a sealed share of the mask key and of the seed of each common atom.

        Raises `LegolmError` for keys that nobody in the roster `identities` signed, and where no atom has k holders.
        """
        kept = self.kept
        for one in adverts:
            check(one, kept.session, identities)
        cohort = Cohort(kept.session, self._shape, adverts, structures)
        if cohort.adverts.get(kept.client) != kept.own:
            raise PublicError(f"secure sum: the keys of {kept.client} among those of all are not its own")
        if identities[kept.client] != identity_of(self._identity).hex():
            raise PublicError(f"secure sum: {kept.client} has another identity in the roster; take its own key's")
        mine = cohort.atoms_of(kept.client)
        if not mine:
            raise PublicError(
                f"secure sum: nothing that {kept.client} holds has {kept.session.k} holders of {len(adverts)} clients"
            )
        self._step("shares")
        kept.adverts, kept.structures = list(adverts), dict(structures)
        kept.identities = {id: identities[id] for id in cohort.adverts}
        kept.seeds = [secrets.token_bytes(KEY_BYTES).hex() for _ in mine]
        group, points = cohort.neighbours(kept.client), cohort.points
        secrets_of = [(kept.mask_secret, None), *zip(kept.seeds, mine, strict=True)]
        shared = [_shared(secret, *cohort.sharing(kept.client, atom), points) for secret, atom in secrets_of]
        found = {}
        for other in group:
            content = b"".join(shamir.to_bytes(one[points[other]]) for one in shared if points[other] in one)
            if other == kept.client:
                kept.own_shares = content.hex()
            else:
                key, about = self._seal_key(cohort, kept.client, other)
                found[other] = seal(key, content, about)
        return found

    def opening(
        self, cohort: Cohort, there: Collection[str], about: bytes, received: np.ndarray, sent: Sequence[str]
    ) -> Opening:
        """What this client would mask, where these sent shares and `received` (n,) is what it got (float32).

        Raises `LegolmError` where that is not what the hashes `sent` say that its holders all got.
        """
        client = self.kept.client
        mine = cohort.atoms_of(client, there)
        if not mine:
            raise PublicError(f"secure sum: too few of the holders are left of what {client} holds")
        if len(sent) != len(cohort.all_atoms):
            raise PublicError(f"secure sum: {len(sent)} hashes of what was sent on {len(cohort.all_atoms)} atoms")
        told = {one.holders: hash for one, hash in zip(cohort.all_atoms, sent, strict=True) if client in one.holders}
        held = [one for one in cohort.all_atoms if one.holders in told]
        got = parts(received[cohort.order(client, held)], held)
        if any(sent_hash(got[holders]) != hash for holders, hash in told.items()):
            raise PublicError(f"secure sum: {client} got another model than what all are told that its holders got")
        return Opening(sorted(there), mine, cohort.order(client, mine), context(cohort, there, about, sent))

    def upload(
        self, cohort: Cohort, sealed: Mapping[str, bytes], opening: Opening, numbers: np.ndarray
    ) -> tuple[np.ndarray, list[str]]:
        """Phase *upload*: the whole numbers of the opening's entries, masked, and a hash of each atom's seed.

        `sealed` is what each of the others sealed for this client.
        """
        kept, client = self.kept, self.kept.client
        lacking = set(cohort.neighbours(client)).intersection(opening.there) - {client, *sealed}
        if lacking or client not in opening.there or not set(sealed) <= set(opening.there) <= set(cohort.adverts):
            raise PublicError(f"secure sum: {client} got shares of others than of those who are there")
        self._step("upload")
        kept.there = opening.there
        kept.sealed = {id: content.hex() for id, content in sealed.items()}
        seeds = dict(zip((one.holders for one in cohort.atoms_of(client)), kept.seeds, strict=True))
        words = to_words(numbers, cohort.bits)
        views, masks = parts(words, opening.atoms), PairMasks(cohort, client, bytes.fromhex(kept.mask_secret))
        there, hashes = set(kept.there), []
        for atom in opening.atoms:
            view, seed = views[atom.holders], bytes.fromhex(seeds[atom.holders])
            near = there.intersection(cohort.ring(atom).of(client))
            masks.add(view, atom, near, opening.about)
            add_own(view, seed, atom, cohort.bits)
            hashes.append(commitment(seed))
        return words, hashes

    def confirm(self, survivors: Collection[str]) -> bytes:
        """Phase *confirm*: a signature that these have uploaded. It is given for one list only."""
        kept = self.kept
        if not {kept.client} <= set(survivors) <= set(kept.there):
            raise PublicError(f"secure sum: {kept.client} is not among the survivors, or some of them sent no shares")
        self._step("confirm")
        kept.survivors = sorted(set(survivors))
        return sign(self._identity, survivors_text(self.cohort(), kept.there, kept.survivors))

    def unmask(self, cohort: Cohort, signatures: Mapping[str, bytes]) -> list[bytes]:
        """Phase *unmask*: shares in the order of `asked`, where enough signed the survivors that this client signed.

        Of a survivor those of its seeds, of the dead that of the key; never both.
        """
        kept, client = self.kept, self.kept.client
        text = survivors_text(cohort, kept.there, kept.survivors)
        signers = {
            id
            for id, signature in signatures.items()
            if id in kept.survivors and is_signed(bytes.fromhex(kept.identities[id]), signature, text)
        }
        opened = cohort.opened(kept.there, kept.survivors, signers)
        wanted = asked(cohort, client, kept.there, kept.survivors, opened)
        if not wanted:
            raise PublicError(f"secure sum: too few of the survivors signed for anything of {client} to be opened")
        self._step("unmask")
        found, bundles = [], dict[str, dict[tuple[str, ...] | None, bytes]]()
        for owner, atom in wanted:
            if owner not in bundles:
                bundles[owner] = self._bundle(cohort, owner)
            found.append(bundles[owner].get(None if atom is None else atom.holders, NOTHING))
        return found

    def _bundle(self, cohort: Cohort, owner: str) -> dict[tuple[str, ...] | None, bytes]:
        """This client's shares of an owner's secrets by atom (None: of its key); none where the seal is broken."""
        kept = self.kept
        common: list[Atom] = [one for one in cohort.atoms_of(owner) if cohort.ring(one).adjacent(owner, kept.client)]
        if owner == kept.client:
            content = bytes.fromhex(kept.own_shares)
        else:
            try:
                key, about = self._seal_key(cohort, owner, kept.client)
                content = unseal(key, bytes.fromhex(kept.sealed[owner]), about)
            except LegolmError:
                return {}
        size = shamir.SHARE_BYTES
        if len(content) != size * (1 + len(common)):
            return {}
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        return dict(zip([None, *(one.holders for one in common)], pieces, strict=True))

    def _seal_key(self, cohort: Cohort, sender: str, recipient: str) -> tuple[bytes, bytes]:
        """Of what one seals for the other, and what the seal is about."""
        other = recipient if sender == self.kept.client else sender
        common = self._sealing.with_(bytes.fromhex(cohort.adverts[other].seal_key))
        return derive(common, b"seal", sender.encode(), recipient.encode(), cohort.digest), cohort.digest

    def _step(self, phase: Phase) -> None:
        kept = self.kept
        if PHASES.index(phase) != PHASES.index(kept.done) + 1:
            raise PublicError(f"secure sum: {kept.client} was asked for {phase} after {kept.done}")
        kept.done = phase


@dataclass(frozen=True)
class Opening:
    """What a client is to send: atoms, and where their entries are in its change.

    `there` are all who sent shares, `about` is the sum's context.
    """

    there: list[str]
    atoms: list[Atom]
    order: np.ndarray
    about: bytes


def commitment(seed: bytes) -> str:
    """By which the server knows a seed that it put together: a hash."""
    return derive(seed, b"commitment").hex()


def asked(
    cohort: Cohort, client: str, there: Collection[str], survivors: Collection[str], opened: Sequence[Atom]
) -> list[tuple[str, Atom | None]]:
    """Whose secret a client gives its share of, in order: of a survivor the seed of each opened atom on which they are
    neighbours, of the dead that have such an atom the key (None), whoever has a share of it."""
    found, rings = list[tuple[str, Atom | None]](), [(one, cohort.ring(one)) for one in opened]
    here, sent = set(there), set(survivors)
    for owner in (id for id in cohort.neighbours(client) if id in here):
        if owner in sent:
            found += [(owner, one) for one, ring in rings if ring.adjacent(owner, client)]
        elif any(owner in ring for _, ring in rings):
            found.append((owner, None))
    return found


def _shared(secret: str, group: Collection[str], least: int, points: Mapping[str, int]) -> dict[int, int]:
    return shamir.share(int(secret, 16), [points[one] for one in group], least)
