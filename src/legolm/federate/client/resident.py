"""The resident process of a device: holds block, data, state and replies, and answers who passes requests to it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import torch

from legolm.block import Block, read_block
from legolm.config import DataConfig
from legolm.data import Examples, own_part
from legolm.errors import LegolmError, brief
from legolm.federate.bridge import Link
from legolm.federate.client.fetch import Piece, UnreachableError, find_block
from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.secure import Keeping
from legolm.federate.client.site import Profile, Site, Split
from legolm.federate.wire import (
    DeviceReply,
    OfferRequest,
    OwnData,
    Welcome,
    block_files,
    block_id,
    kind_of,
    largest,
    pack,
    plain,
    read_welcome,
    unpack,
)
from legolm.models import choose_device, product_speed
from legolm.runs import Kept
from legolm.system import available_bytes
from legolm.trust import identity_key, read_roster

KEPT = 32
"""Replies kept of a run: as many as may be asked for again."""
IN_TIME = 0.9
"""Of the time that is left for a reply: the rest is for its way."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Holdings:
    """What a device was given: its folder, its rows, folders with blocks, how it works, and the memory (MB, 1e6 bytes)
    that training may take; what the machine has if not given. `roster` has everyone's identities, for secure sums.
    """

    home: Path
    data: tuple[str, ...]
    blocks: tuple[Path, ...] = ()
    profile: Profile = field(default_factory=Profile)
    memory_mb: float | None = None
    roster: Path | None = None


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
            raise LegolmError(
                "secure sum: this device has no roster of identities; get it from the server's owner (legolm devices "
                "roster) and start this with --roster"
            )
        return self.keeps


class Resident:
    """Answers one request at a time. `name` is who the device is to its server; None where that does not say so."""

    def __init__(self, held: Holdings, name: str | None, piece: Piece, note: Callable[[str], None]) -> None:
        self._held, self._name, self._piece, self._note = held, name, piece, note
        self._lock = threading.Lock()
        self._run = ""
        self._sites: dict[tuple[str, str], Site] = {}
        self._told: dict[tuple[str, str], str] = {}
        self._runtime = ClientRuntime(self._site)
        self._secrets: dict[str, bytes] = {}

    def answer(self, welcome: str, request: bytes, left_s: float | None = None) -> tuple[dict[str, Any], bytes]:
        """A header, empty where all is well, and the reply; the same bytes have the same reply, ever.

        Training stops itself in time for a reply within `left_s` seconds, after one step at least.
        `error` says what is wrong with the request or the device, `again` that it may be asked again.
        """
        came = time.monotonic()
        try:
            told = read_welcome(welcome)
            with self._lock:
                self._check_mine(told)
                if kind_of(request) == "offer":
                    return {}, pack(self._describe(unpack(request, OfferRequest)[0]), {})
                kept = Kept(self._folder(told.run) / "replies", KEPT)
                reply = kept.get(request)
                if reply is None:
                    self._settle(told, welcome)
                    began = time.monotonic()
                    until = None if left_s is None else came + IN_TIME * left_s
                    reply = self._runtime.answer(request, until)
                    kept.put(request, reply)
                    self._note(f"{kind_of(request)}: answered in {time.monotonic() - began:.1f} s")
                return {}, reply
        except UnreachableError as error:
            return {"again": plain(error)}, b""
        except LegolmError as error:
            self._note(f"a request was refused: {error}")
            return {"error": plain(error)}, b""
        except Exception as error:  # of torch, say: without memory it raises what it likes
            self._note(f"a request failed: {type(error).__name__}: {brief(error)}")
            return {"error": plain(f"{type(error).__name__}: {error}")}, b""

    def serve(self, listener: socket) -> None:
        """Answer who connects, until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Link(connection),), daemon=True).start()

    def _serve(self, link: Link) -> None:
        with link:
            try:
                header, request = link.receive()
                left = header.get("left_s")
                left_s = float(left) if isinstance(left, int | float) else None
                link.send(*self.answer(str(header.get("welcome", "")), request, left_s))
            except OSError:
                return  # who asked is gone; the reply is kept

    def _folder(self, run: str) -> Path:
        return self._held.home / "runs" / run

    def _site(self, client: str, block: str) -> Site:
        """For the runtime: of what the last welcome told."""
        if (client, block) not in self._sites:
            raise LegolmError(f"client {client}, block {block}: the request is not for whom its welcome says")
        return self._sites[client, block]

    def _check_mine(self, told: Welcome) -> None:
        if self._name is not None and told.client != self._name:
            raise LegolmError(f"client {told.client}: this device is {self._name!r}")

    def _describe(self, asked: OfferRequest) -> DeviceReply:
        """What this device is now: another answer at another time."""
        held, where = self._held, choose_device(self._held.profile.device)
        torch.set_num_threads(held.profile.threads)
        memory = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else available_bytes()
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
            self._run, self._runtime = told.run, ClientRuntime(self._site)
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
        rows, keeps = self._examples(told.data), self._keeping(told.client)
        self._sites[key] = HeldSite(folder, self._folder(told.run), rows, self._held.profile, keeps)
        self._told[key] = text

    def _keeping(self, client: str) -> Keeping | None:
        """For secure sums, where there is a roster: this device's identity. Secrets are in this process's memory."""
        home, path = self._held.home, self._held.roster
        if path is None:
            return None
        secrets = self._secrets
        return Keeping(
            identity_key(home),
            read_roster(path),
            lambda: secrets.get(client, b""),
            lambda content: secrets.update({client: content}),
        )

    def _examples(self, told: OwnData) -> dict[Split, Examples]:
        said: list[str] = []
        found = own_part(self._held.data, told.config, told.part, told.seed, "--data", said)
        for line in said:
            self._note(line)
        return {split: getattr(found, split) for split in SPLITS}
