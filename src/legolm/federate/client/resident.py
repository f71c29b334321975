"""The resident process of a device: holds block, data, state and replies, and answers who passes requests to it."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from legolm.block import Block, read_block
from legolm.config import DataConfig
from legolm.data import Examples, own_part
from legolm.errors import LegolmError, PublicError
from legolm.federate.client.answering import Answering
from legolm.federate.client.fetch import Piece, find_block
from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.secure import Keeping
from legolm.federate.client.site import Profile, Site, Split
from legolm.federate.wire import (
    DeviceReply,
    EvaluateRequest,
    OfferRequest,
    OwnData,
    TrainRequest,
    Welcome,
    block_files,
    block_id,
    kind_of,
    largest,
    pack,
    rows_hash,
    unpack,
)
from legolm.models import choose_device, free_bytes, product_speed
from legolm.system import atomic_write
from legolm.trust import identity_key, read_roster

IN_TIME = 0.9
"""Of the time that is left for a reply: the rest is for its way."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SUMMED = {"keys", "shares", "train", "confirm", "unmask", "evaluate"}
"""Kinds of requests that a device with a roster answers, beside an offer: what a run with secure sums asks."""


@dataclass(frozen=True)
class Holdings:
    """What a device was given: its folder, its rows, folders with blocks, how it works, and the memory (MB, 1e6 bytes)
    that training may take; what the machine has if not given. `roster` has everyone's identities, for secure sums, of
    which it refuses those that as many `colluders` could open.
    """

    home: Path
    data: tuple[str, ...]
    blocks: tuple[Path, ...] = ()
    profile: Profile = field(default_factory=Profile)
    memory_mb: float | None = None
    roster: Path | None = None
    colluders: int = 1


@dataclass(frozen=True)
class HeldSite:
    """The device's part of one run, in the folder `run`, with one block, in `folder`."""

    folder: Path
    run: Path
    rows: dict[Split, Examples]
    how: Profile
    keeps: Keeping | None = None

    def block(self) -> Block:
        """Of its folder."""
        return read_block(self.folder)

    def examples(self, split: Split) -> Sequence[Examples]:
        """The device's own."""
        return (self.rows[split],)

    def state(self) -> Path:
        """`state/` of the run's folder."""
        return self.run / "state"

    def profile(self) -> Profile:
        """As given."""
        return self.how

    def prompts(self) -> DataConfig | None:
        """None: the block's own tokenizer has its run's."""
        return None

    def keeping(self) -> Keeping:
        """As given."""
        if self.keeps is None:
            raise PublicError(
                "secure sum: this device has no roster of identities; get it from the server's owner (legolm devices "
                "roster) and start this with --roster"
            )
        return self.keeps


class Resident(Answering):
    """A device's own. Training stops itself in time for its reply, after one step at least."""

    def __init__(self, held: Holdings, name: str | None, piece: Piece, note: Callable[[str], None]) -> None:
        super().__init__(held.home, name, note)
        self._held, self._piece = held, piece
        self._run = ""
        self._sites: dict[tuple[str, str], Site] = {}
        self._told: dict[tuple[str, str], str] = {}
        self._read: tuple[str, OwnData, dict[Split, Examples]] | None = None
        self._runtime = ClientRuntime(self._site, self._write)
        self._secrets: dict[tuple[str, str], bytes] = {}

    def _at_once(self, request: bytes) -> bytes | None:
        if (kind := kind_of(request)) == "offer":
            return pack(self._describe(unpack(request, OfferRequest)[0]), {})
        if kind == "evaluate" and unpack(request, EvaluateRequest)[0].otherwise is not None:
            raise PublicError("it asks for a score by input, which would tell the tokens of this device's questions")
        if self._held.roster is not None:
            _check_summed(kind, request)
        return None

    def _about(self, told: Welcome) -> bytes:
        """Of its rows, as this run reads them: others train anew."""
        digests = "".join(rows.digest for rows in self._examples(told).values())
        return hashlib.sha256(digests.encode()).digest()

    def _work(self, told: Welcome, welcome: str, request: bytes, until: float | None) -> bytes:
        self._settle(told, welcome)
        now = time.monotonic()
        return self._runtime.answer(request, None if until is None else now + IN_TIME * (until - now))

    def _write(self, path: Path, content: bytes) -> None:
        self._with_room(lambda: atomic_write(path, content))

    def _site(self, client: str, block: str) -> Site:
        """For the runtime: of what the last welcome told."""
        if (client, block) not in self._sites:
            raise PublicError(f"client {client}, block {block}: the request is not for whom its welcome says")
        return self._sites[client, block]

    def _describe(self, asked: OfferRequest) -> DeviceReply:
        """What this device is now: another answer at another time."""
        held, where = self._held, choose_device(self._held.profile.device)
        if asked.run != self._run:
            self._runtime = ClientRuntime(self._site, self._write)  # the last run's models are not in this one's way
        torch.set_num_threads(held.profile.threads)
        memory = free_bytes(where)
        if held.memory_mb is not None:
            memory = min(memory, int(held.memory_mb * 1e6))
        known = {path.name for path in (held.home / "blocks").glob("[!.]*")}
        known |= {block_id(block_files(folder)) for folder in held.blocks}
        found = DeviceReply(
            memory=memory,
            disk=shutil.disk_usage(held.home).free,
            speed=product_speed(asked.precision, where),
            held=sorted(known & {one.id for one in asked.offers}),
        )
        block = largest(asked, found)
        if isinstance(block, str):
            self._note(f"this device takes no part: {block}")
        else:
            self._note(f"block {block.name}: is the largest that fits this device")
        return found

    def _settle(self, told: Welcome, text: str) -> None:
        """Be ready for this run, block and data. Raises `LegolmError` for what is another's, or cannot be."""
        key = told.client, told.block
        if told.run != self._run:
            self._run, self._runtime = told.run, ClientRuntime(self._site, self._write)
            self._sites.clear()
            self._told.clear()
        if self._told.get(key) == text:
            return
        folder = find_block(told, self._held.home, self._held.blocks, self._piece, self._note)
        try:
            read_block(folder)
        except LegolmError:
            if folder.parent == self._held.home / "blocks":
                shutil.rmtree(folder)
            raise
        rows, keeps = self._examples(told), self._keeping(told)
        self._sites[key] = HeldSite(folder, self._folder(told.run), rows, self._held.profile, keeps)
        self._told[key] = text

    def _keeping(self, told: Welcome) -> Keeping | None:
        """For secure sums, where there is a roster: this device's identity. Secrets are in this process's memory."""
        home, path = self._held.home, self._held.roster
        if path is None:
            return None
        secrets, key = self._secrets, (told.run, told.client)
        return Keeping(
            identity_key(home),
            read_roster(path),
            lambda: secrets.get(key, b""),
            lambda content: secrets.update({key: content}),
            self._folder(told.run) / "opened",
            self._held.colluders,
            told.block_id,
            rows_hash(told.data),
        )

    def _examples(self, told: Welcome) -> dict[Split, Examples]:
        """Its rows, which are read once a run."""
        if self._read is None or self._read[:2] != (told.run, told.data):
            said: list[str] = []
            found = own_part(self._held.data, told.data.config, told.data.part, told.data.seed, "--data", said)
            for line in said:
                self._note(line)
            self._read = told.run, told.data, {split: getattr(found, split) for split in SPLITS}
        return self._read[2]


def _check_summed(kind: str, request: bytes) -> None:
    """Raise `LegolmError` for what would tell something of this device alone."""
    if kind not in SUMMED or (kind == "train" and unpack(request, TrainRequest)[0].secure is None):
        what = {"train": "change", "calibrate": "second moments"}.get(kind, f"answer to {kind!r}")
        raise PublicError(
            f"it asks for this device's {what} alone, and --roster is for sums of many; start the device without it to "
            "send that"
        )
