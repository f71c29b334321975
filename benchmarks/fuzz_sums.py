"""The messages of a secure sum with noise for benchmarks/fuzz.py, each for a client or a server that waits for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import numpy as np
import torch
from pydantic import BaseModel

from legolm import adapter
from legolm.block import Coverage
from legolm.config import DpConfig, TrainConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.client.secure import LATER, Keeping, keys, masked
from legolm.federate.server.secure import take
from legolm.privacy import SecureServer, Session, Structure, identity_of, sent_hashes

RANK, EXAMPLES = 2, 7
REPLIES: Mapping[str, type[BaseModel]] = {
    "keys": wire.KeysReply,
    "shares": wire.SharesReply,
    "masked": wire.MaskedReply,
    "confirm": wire.ConfirmReply,
    "unmask": wire.UnmaskReply,
}


SCRATCH = TemporaryDirectory()


class Device:
    """What a client keeps; `kept` are the secrets of its sum."""

    def __init__(self, id: str, roster: Mapping[str, str], kept: bytes = b"") -> None:
        self.kept = kept
        opened = Path(SCRATCH.name) / uuid4().hex
        self.keeping = Keeping(
            secret(id), roster, lambda: self.kept, lambda content: setattr(self, "kept", content), opened
        )


def secret(id: str) -> bytes:
    return id.encode().ljust(32, b".")


def answered(content: bytes, device: Device, block: Coverage) -> bytes:
    """A client's reply, as its runtime gives it; a change of ones stands for training."""
    kind = wire.kind_of(content)
    if kind == "keys":
        return keys(wire.unpack(content, wire.KeysRequest)[0], device.keeping, block, EXAMPLES)
    if kind in LATER:
        request, phase = LATER[kind]
        wire.unpack(content, request)
        return phase(content, device.keeping, block)
    header, tensors = wire.unpack(content, wire.TrainRequest)
    if max(header.rank, header.settings.run_rank, header.settings.fold_rank) > 64 or header.secure is None:
        raise LegolmError("larger than what the fuzzer opens, or no sum's")
    opened = wire.open_(
        header, block, {name: tensor for name, tensor in tensors.items() if not name.startswith("secure.")}
    )
    delta = {key: torch.ones_like(one) for key, one in opened.start.items() if key not in opened.frozen}
    return masked(header, tensors, device.keeping, block, opened.start, delta, {}, lambda lost: "")


def messages(part: Coverage) -> tuple[list[bytes], partial[object]]:
    """All that passes in a sum of three, and the reader: of one of them by who waits for it."""
    ids = ("a", "b", "c")
    session = Session(run="r", round=3, k=3, targets=["up_proj"], rank=RANK, frozen_side=False, dropouts=0)
    roster = {id: identity_of(secret(id)).hex() for id in ids}
    structure = Structure.of(part, RANK)
    server = SecureServer(session, part.shape, dict.fromkeys(ids, structure), roster)
    devices = {id: Device(id, roster) for id in ids}
    found: list[bytes] = []
    clients: dict[str, bytes] = {}
    servers: dict[str, SecureServer] = {}
    about = {"run": "r", "client": "a", "block": "b"}
    common = {"base_fingerprint": "f", "coverage_hash": "c", "rank": RANK, "scale": 2.0}

    def ask(kind: str, header: object, tensors: adapter.Tensors, reply: str) -> None:
        """All of them, `a` first, whose message and state are noted; what the server took is so, too."""
        servers[reply] = copy.deepcopy(server)
        for id in ids:
            own = header.model_copy(update={"client": id})  # type: ignore[attr-defined]
            if kind == "train":
                inbox = server.inbox(id)
                upload = wire.SecureUpload(
                    session=session,
                    there=list(ids),
                    senders=list(inbox),
                    sizes=[len(one) for one in inbox.values()],
                    alike=alike,
                )
                own = own.model_copy(update={"secure": upload})
                tensors = tensors | {"secure.sealed": wire.to_tensor(list(inbox.values()))}
            content = wire.pack(own, tensors)
            if id == "a":
                clients[kind] = devices[id].kept
                found.append(content)
            answer = answered(content, devices[id], part)
            if id == "a":
                found.append(answer)
            take(server, id, answer, REPLIES[reply])

    ask("keys", wire.KeysRequest(**about, **common, session=session, layers=None), {}, "keys")
    server.close_keys()
    told = {"session": session}
    shares = wire.SharesRequest.model_validate(
        about | told | {"adverts": server.adverts, "structures": server.structures}
    )
    ask("shares", shares, {}, "shares")
    settings = wire.TrainSettings(
        targets=["up_proj"], run_rank=RANK, ranks={}, dropout=0.0, train=TrainConfig(), precision="fp32",
        frozen_side=False, derived_seed=None, proximal=0.0, codec="none", keep=1.0, error_feedback=True,
        dp=DpConfig(level="client", noise="distributed", noise_multiplier=1.0),
    )  # fmt: skip
    sent = adapter.slice_factors(part, adapter.init_factors(part.shape, ["up_proj"], RANK, seed=0), RANK)
    given = wire.write(settings, part, RANK, sent, {})
    train = wire.TrainRequest(
        **about, **common, phase="round", round=3, steps=4, done=8, total=12, seed=5, settings=given.settings
    )
    bounds = np.full(server.cohort.grid.row_count, 0.5, dtype=np.float32)
    flat = torch.cat([given.start[key].flatten() for key in server.cohort.grid.layout.shapes]).numpy()
    whole = np.zeros(server.cohort.grid.layout.total, dtype=np.float32)
    whole[server.cohort.places("a")] = flat
    alike = wire.Alike(
        atoms=sent_hashes(server.cohort, whole), blocks={wire.block_key(train): wire.block_hash("", given.hash)}
    )
    ask("train", train, dict(given.content) | {"secure.bounds": torch.from_numpy(bounds)}, "masked")
    ask("confirm", wire.ConfirmRequest.model_validate(about | told | {"survivors": list(ids)}), {}, "confirm")
    unmask = wire.UnmaskRequest.model_validate(about | told | {"signers": list(server.signatures)})
    ask("unmask", unmask, {"signatures": wire.to_tensor(list(server.signatures.values()))}, "unmask")
    return found, partial(read, clients=clients, servers=servers, roster=roster, block=part)


def read(
    content: bytes,
    folder: Path,
    clients: Mapping[str, bytes],
    servers: Mapping[str, SecureServer],
    roster: Mapping[str, str],
    block: Coverage,
) -> object:
    """By whoever waits for this kind: replies have no client in their header."""
    kind = wire.kind_of(content)
    is_reply = b'\\"client\\"' not in content or kind == "masked" or (kind == "keys" and b'\\"advert\\"' in content)
    if is_reply and kind in REPLIES:
        take(copy.deepcopy(servers[kind]), "a", content, REPLIES[kind])
        return None
    return answered(content, Device("a", roster, clients.get(kind, b"")), block)
