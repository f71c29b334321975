"""A client's answers in a secure sum, from what its site keeps between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from legolm.adapter import Flat, Layout, Tensors, tensors_hash, under_prefix
from legolm.block import Coverage
from legolm.errors import LegolmError, PublicError
from legolm.federate.wire import (
    BOUNDS,
    MASKED,
    OPENED,
    SEALED,
    SHARES,
    SIGNATURES,
    ConfirmReply,
    ConfirmRequest,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SharesReply,
    SharesRequest,
    SumRequest,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
    block_hash,
    block_key,
    counts,
    from_tensor,
    pack,
    scale,
    to_tensor,
    told,
    unpack,
)
from legolm.privacy import Secrets, SecureClient, Session, Structure, clipped, gaussian, quantize
from legolm.system import atomic_write


@dataclass(frozen=True)
class Keeping:
    """What a client has for secure sums: its secret Ed25519 key (32 bytes), the roster of everyone's public ones
    (hexadecimal), where the secrets of a sum are between its phases, and the file with the last round that it helped to
    open. It takes part in no sum that would be open to as many `colluders`. `block` is the hash of its block's files,
    `rows` of how it was told to read its rows (`rows_hash`); both are empty in a simulation.
    """

    identity: bytes
    roster: Mapping[str, str]
    read: Callable[[], bytes]
    write: Callable[[bytes], None]
    opened: Path
    colluders: int = 1
    block: str = ""
    rows: str = ""


def keys(request: KeysRequest, keeping: Keeping, coverage: Coverage, examples: int) -> bytes:
    """Begin a sum. Raises `LegolmError` for another one of a round that this client has opened already, and of those
    before it: the difference of two sums is a client's change."""
    session, client = request.session, request.client
    if client not in keeping.roster:
        raise PublicError(
            f"secure sum: client {client} is not in the roster of identities; get the federation's roster"
        )
    _check_rows(session, client, keeping)
    if session.k < keeping.colluders + 2:  # two honest holders at least
        raise PublicError(
            f"secure sum: entries open with {session.k} holders, and this device reckons with {keeping.colluders} "
            f"colluders, which takes {keeping.colluders + 2}; set privacy.secure.colluders, or --colluders here"
        )
    if session.round <= (opened := _opened(keeping)):
        raise PublicError(f"secure sum: {client} {OPENED} {opened} already")
    trained = coverage if request.layers is None else coverage.within(request.layers)
    structure = Structure.of(trained, request.rank)
    made = SecureClient.begin(session, client, keeping.identity, coverage.shape, structure, examples)
    _keep(keeping, made)
    return pack(KeysReply(advert=made.kept.own), {})


def shares(content: bytes, keeping: Keeping, coverage: Coverage) -> bytes:
    """The reply to a `SharesRequest`."""
    request, _ = unpack(content, SharesRequest)
    client = _client(request, keeping, coverage)
    sealed = client.shares(request.adverts, request.structures, keeping.roster)
    _keep(keeping, client)
    sizes = [len(one) for one in sealed.values()]
    return pack(SharesReply(to=list(sealed), sizes=sizes), {SHARES: to_tensor(list(sealed.values()))})


def confirm(content: bytes, keeping: Keeping, coverage: Coverage) -> bytes:
    """The reply to a `ConfirmRequest`."""
    request, _ = unpack(content, ConfirmRequest)
    client = _client(request, keeping, coverage)
    signature = client.confirm(request.survivors)
    _keep(keeping, client)
    return pack(ConfirmReply(signature=signature.hex()), {})


def unmask(content: bytes, keeping: Keeping, coverage: Coverage) -> bytes:
    """The reply to an `UnmaskRequest`."""
    request, tensors = unpack(content, UnmaskRequest)
    signatures = from_tensor(tensors.get(SIGNATURES), [64] * len(request.signers))
    client = _client(request, keeping, coverage)
    found = client.unmask(client.cohort(), dict(zip(request.signers, signatures, strict=True)))
    atomic_write(keeping.opened, str(max(_opened(keeping), client.kept.session.round)))
    _keep(keeping, client)
    return pack(UnmaskReply(), {SHARES: to_tensor(found)})


def masked(
    request: TrainRequest,
    content: Tensors,
    keeping: Keeping,
    coverage: Coverage,
    start: Mapping[str, Tensor],
    delta: Tensors,
    lost: Tensors,
    keep: Callable[[Tensors], str],
) -> bytes:
    """The reply to a train request with `secure`: the change `delta` as whole numbers, masked.

    `start` is what was received. `lost` is what rounding and limits took of the last one; `keep` keeps what they take
    of this one. Entries that are never sent lose nothing. With noise distributed the change is clipped over all that
    this client holds, its part of the noise is added, and nothing of it comes with a later one.
    """
    secure, own, settings = request.secure, under_prefix("secure", content), request.settings
    assert secure is not None
    dp = settings.dp if settings.dp is not None and settings.dp.noise == "distributed" else None
    if dp is not None:
        delta = dict(clipped(delta, dp.clip))
    elif settings.error_feedback and lost:
        delta = {key: tensor + lost[key] for key, tensor in delta.items()}
    _check_alike(request, content, keeping)
    client = _client(SumRequest(**_named(request), session=secure.session), keeping, coverage)
    cohort, me, layout = client.cohort(), request.client, Layout.of(delta)
    rows = own[BOUNDS].numpy() if BOUNDS in own else np.zeros(0, np.float32)
    if rows.dtype != np.float32 or rows.shape != (cohort.grid.row_count,) or not bool((rows > 0).all()):
        raise PublicError(f"secure sum: bounds of {rows.shape} rank rows; there are {cohort.grid.row_count}")
    sealed = from_tensor(own.get(SEALED), secure.sizes)
    received, change = _flat(start, layout), _flat(delta, layout)
    trained = coverage if settings.layers is None else coverage.within(settings.layers)
    signed = Structure.of(trained, request.rank).hash(coverage.shape) == client.kept.own.held
    if not signed or len(change) != len(cohort.places(me)):
        raise PublicError(f"secure sum: what {me} was asked to train is not what it signed")
    about = told(request, rows, secure.alike)
    opening = client.opening(cohort, secure.there, about, received, secure.alike.atoms)
    made = scale(cohort, opening.atoms, secure.there, rows, dp)
    share = counts(secure.session, client.kept.adverts, set(secure.there))[me]
    wanted = change[opening.order] * np.float32(share)
    # Rounding is no secret, and without noise a run that goes on is to end as one that was not stopped.
    draws = np.random.default_rng(request.seed if made.noise is None else None)
    noise = None if made.noise is None else made.noise * gaussian(wanted.shape).numpy()
    numbers = quantize(wanted, made, draws, noise)
    words, seeds = client.upload(cohort, dict(zip(secure.senders, sealed, strict=True)), opening, numbers)
    _keep(keeping, client)
    if dp is None and settings.error_feedback:
        left = np.zeros_like(change)
        left[opening.order] = (wanted - numbers * made.step) / np.float32(share)
        keep(dict(Flat(torch.from_numpy(left), layout)))
    return pack(MaskedReply(seeds=seeds), {MASKED: to_tensor([words.tobytes()])})


def _check_alike(request: TrainRequest, content: Tensors, keeping: Keeping) -> None:
    """Raise `LegolmError` where this client trains from other things than all are told: one that made others learn
    nothing would see its change alone."""
    assert request.secure is not None
    alike, settings = request.secure.alike, request.settings
    if settings.codec != "none" or settings.fold_rank or settings.fold_seeds:
        raise PublicError("secure sum: what is folded, or rounded on its way, is not among what all are told alike")
    sent = tensors_hash({name: one for name, one in content.items() if not name.startswith("secure.")})
    if alike.blocks.get(block_key(request)) != block_hash(keeping.block, sent):
        raise PublicError(
            f"secure sum: {request.client} got another block {request.block} or adapter than all are told"
        )
    _check_rows(request.secure.session, request.client, keeping)


def _check_rows(session: Session, client: str, keeping: Keeping) -> None:
    """Raise `LegolmError` where it reads its rows otherwise than all signed: it would count, or learn, other ones."""
    if session.rows != keeping.rows:
        raise PublicError(f"secure sum: {client} is to read its rows otherwise than all are told")


def _flat(factors: Mapping[str, Tensor], layout: Layout) -> np.ndarray:
    flat: np.ndarray = torch.cat([factors[key].flatten() for key in layout.shapes]).numpy()
    return flat


def _named(request: TrainRequest) -> dict[str, str]:
    return {"run": request.run, "client": request.client, "block": request.block}


def _opened(keeping: Keeping) -> int:
    try:
        return int(keeping.opened.read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        raise LegolmError(f"secure sum: {keeping.opened} is broken; take part in another run") from None


def _kept(keeping: Keeping) -> Secrets | None:
    content = keeping.read()
    if not content:
        return None
    try:
        return Secrets.model_validate_json(content)
    except ValidationError:
        raise PublicError("secure sum: the secrets that were kept of it are broken; it begins anew") from None


def _keep(keeping: Keeping, client: SecureClient) -> None:
    keeping.write(client.kept.model_dump_json().encode())


def _client(request: SumRequest, keeping: Keeping, coverage: Coverage) -> SecureClient:
    """As it was after its last phase. Raises `LegolmError` where it knows nothing of this sum."""
    kept = _kept(keeping)
    if kept is None or kept.client != request.client or kept.session != request.session:
        raise PublicError(f"secure sum: {request.client} has no secrets of this sum; it ended meanwhile, or began anew")
    return SecureClient(kept, keeping.identity, coverage.shape)


Answer = Callable[[bytes, Keeping, Coverage], bytes]
LATER: Mapping[str, tuple[type[SumRequest], Answer]] = {
    "shares": (SharesRequest, shares),
    "confirm": (ConfirmRequest, confirm),
    "unmask": (UnmaskRequest, unmask),
}
"""Phases that need the site's secrets and block, and no training."""
