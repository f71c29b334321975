"""The masks of one client's sum: made by the client, and of those who are gone by the server."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from legolm.privacy.atoms import Atom
from legolm.privacy.cohort import Cohort
from legolm.privacy.primitives import Agreeing, derive, joined, stream


def context(cohort: Cohort, there: Collection[str], about: bytes, sent: Sequence[str]) -> bytes:
    """What a sum is about: session, signed keys, who sent shares, what all were told alike, and hashes of what was
    `sent` on each atom, that of the others too: it shapes what they learn on this one."""
    who, what = (joined(*(one.encode() for one in ids)) for ids in (sorted(there), sent))
    return hashlib.sha256(joined(cohort.digest, who, about, what)).digest()


def sent_hashes(cohort: Cohort, sent: np.ndarray) -> list[str]:
    """Of what is sent at each place (float32), for each of all atoms: clients train from those that never open, too."""
    return [sent_hash(sent[one.places]) for one in cohort.all_atoms]


def sent_hash(values: np.ndarray) -> str:
    """Of an atom's, in its order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).hexdigest()


class PairMasks:
    """The masks that a client has in common with each other one; `secret` is its mask key."""

    def __init__(self, cohort: Cohort, client: str, secret: bytes) -> None:
        self._cohort, self._client, self._key = cohort, client, Agreeing(secret)
        self._agreed: dict[str, bytes] = {}

    def add(self, into: np.ndarray, atom: Atom, others: Collection[str], about: bytes, sign: int = 1) -> None:
        """Add the masks of an atom, `sign` times; they cancel in the sum of both ends where `about` is the same."""
        for other in others:
            if other == self._client:
                continue
            if other not in self._agreed:
                self._agreed[other] = self._key.with_(bytes.fromhex(self._cohort.adverts[other].mask_key))
            key = derive(self._agreed[other], b"pair", self._cohort.session.text, atom.name, about)
            mask = stream(key, len(into), self._cohort.bits)
            if (self._client < other) == (sign > 0):
                into += mask
            else:
                into -= mask


def add_own(into: np.ndarray, seed: bytes, atom: Atom, bits: int, sign: int = 1) -> None:
    """Add a client's own mask of an atom, `sign` times."""
    mask = stream(derive(seed, b"own", atom.name), len(into), bits)
    if sign > 0:
        into += mask
    else:
        into -= mask


def parts(words: np.ndarray, chosen: Sequence[Atom]) -> Mapping[tuple[str, ...], np.ndarray]:
    """Views of the words of each atom, which stand one after the other; by holders."""
    ends = np.cumsum([len(one.places) for one in chosen])
    return {one.holders: words[end - len(one.places) : end] for one, end in zip(chosen, ends, strict=True)}
