"""What secure sums by atom cost, and that they are exact (`python benchmarks/privacy.py --only secagg loss`).

`secagg`: about a million entries of an adapter, clients with four blocks in equal numbers (the LLM, three quarters and
half of its neurons, half of its KV groups and layers), every phase in this process. `secagg_client_cpu_s` is the
median over clients of the CPU time of all that one client does in a round beside training, at 8, 100 and 1000 clients;
atoms are made once before, as in a run. `secagg_max_abs_error` is against the sum of the same whole numbers in the
clear, with and without clients that go. `dropouts_survived`: how many of 8 and of 100 holders of everything (of a
smaller adapter) may go, at any phase, until the sum does not open any more. `secagg_upload_ratio` is the most of all
clients: all bytes that one sends in a round over its update in fp32.

Of 1000 clients, where not all are neighbours, four are watched, one of each block; what the others seal for them is
noise of the same size. `secagg_neighbours` and `secagg_beside_bytes` (all that is sent beside the masked numbers) are
the most of the four; `all pairs` is as if all holders were neighbours. The sum of 300 clients (of a smaller adapter),
of whom 99 go before the upload, is in `secagg_max_abs_error`.

`loss`: the starter model and data, eight clients, the same run plain and with secure sums; `secagg_loss_ratio` is the
LLM's loss on test data with, over without.

`epsilon`: the same run of rank 1 on v_proj, for few entries leave something beside noise, with differential privacy;
`loss_at_epsilon` is the LLM's loss on test data without, of examples, and of clients in secure sums.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.models import Shape
from legolm.privacy import (
    Cohort,
    Opening,
    Scale,
    SecureClient,
    SecureServer,
    Session,
    Structure,
    identity_of,
    neighbours,
    quantize,
    quantum_range,
    sent_hashes,
    shamir,
    threshold,
)
from legolm.privacy.cohort import survivors_text
from legolm.privacy.primitives import is_signed, sign

SMALL = Shape("llama", layers=1, hidden=8, neurons=64, kv_groups=2, queries_per_group=2, head_dim=8)
SHAPE = Shape("llama", layers=20, hidden=576, neurons=1536, kv_groups=4, queries_per_group=2, head_dim=64)
RANK = 8
PHASES = ("keys", "shares", "upload", "confirm", "unmask")
ABOUT = b"the same for all"


def four_blocks() -> list[Coverage]:
    """The LLM and three parts of it."""
    layers, groups, neurons = range(SHAPE.layers), tuple(range(SHAPE.kv_groups)), range(SHAPE.neurons)
    half = tuple(layers)[::2]
    return [
        Coverage.full(SHAPE),
        Coverage(SHAPE, tuple(layers), (groups,) * len(layers), (tuple(n for n in neurons if n % 4),) * len(layers)),
        Coverage(SHAPE, tuple(layers), (groups,) * len(layers), (tuple(n for n in neurons if n % 2),) * len(layers)),
        Coverage(SHAPE, half, (groups[:2],) * len(half), (tuple(neurons),) * len(half)),
    ]


class Timed:
    """CPU seconds and bytes sent by client."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def __call__(self, client: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; its time is the client's."""
        began = time.process_time()
        found = work()
        self.seconds[client] = self.seconds.get(client, 0.0) + time.process_time() - began
        return found

    def sent(self, client: str, count: int) -> None:
        """So many bytes more."""
        self.bytes[client] = self.bytes.get(client, 0) + count


def secure_sum(
    clients: int, blocks: list[Coverage], gone: Mapping[str, str], timed: Timed
) -> tuple[int, bool, dict[str, int]]:
    """(largest error, whether every atom opened, entries of each client's update); clients take blocks in turn."""
    draws, shape = np.random.default_rng(0), blocks[0].shape
    session, structures, secrets, identities = begun(clients, blocks)
    ids = list(structures)
    server = SecureServer(session, shape, structures, identities)
    at: dict[str, SecureClient] = {}

    def there(phase: str) -> list[str]:
        return [id for id in ids if id not in gone or PHASES.index(gone[id]) > PHASES.index(phase)]

    for id in there("keys"):
        at[id] = timed(id, partial(SecureClient.begin, session, id, secrets[id], shape, structures[id], 1))
        server.advert(id, at[id].kept.own)
        timed.sent(id, len(at[id].kept.own.model_dump_json()))
    server.close_keys()
    cohort = server.cohort
    for id in there("keys"):  # atoms and where they are: public, and the same in every round
        cohort.order(id, cohort.atoms_of(id))
    for id in there("shares"):
        sealed = timed(id, partial(at[id].shares, server.adverts, server.structures, identities))
        server.shares(id, sealed)
        timed.sent(id, sum(map(len, sealed.values())))
    received = draws.standard_normal(cohort.grid.layout.total, dtype=np.float32)
    plain, sent = np.zeros(cohort.grid.layout.total, dtype=np.int64), sent_hashes(cohort, received)
    for id in there("upload"):
        own, change = received[cohort.places(id)], draws.normal(0, 0.01, len(cohort.places(id))).astype(np.float32)

        def upload(id: str = id, own: np.ndarray = own, change: np.ndarray = change) -> tuple[Any, Any, Any]:
            client = at[id]
            opening = client.opening(cohort, server.there, ABOUT, own, sent)
            found = whole_numbers(cohort, opening, change)
            return found, client.upload(cohort, server.inbox(id), opening, found), opening

        found, (words, seeds), opening = timed(id, upload)
        plain[np.concatenate([one.places for one in opening.atoms])] += found
        server.upload(id, words, seeds)
        timed.sent(id, words.nbytes + 32 * len(seeds))
    for id in (id for id in there("confirm") if id in server.survivors):
        server.confirm(id, timed(id, partial(at[id].confirm, server.survivors)))
        timed.sent(id, 64)
    for id in (id for id in there("unmask") if id in server.survivors):
        shares = timed(id, partial(unmasked, at[id], server.signatures))
        server.unmask(id, shares)
        timed.sent(id, sum(map(len, shares)))
    opened, closed = server.finish(ABOUT, received)
    errors = [int(np.abs(one.total - plain[one.atom.places]).max()) for one in opened]
    return max(errors, default=0), bool(opened) and not closed, {id: len(cohort.places(id)) for id in at}


def begun(
    clients: int, blocks: list[Coverage]
) -> tuple[Session, dict[str, Structure], dict[str, bytes], dict[str, str]]:
    """A session, what each client holds, its secret identity, and the roster; clients take blocks in turn."""
    ids = [f"c{number:03d}" for number in range(clients)]
    session = Session(run="bench", round=1, k=3, targets=None, rank=RANK, frozen_side=True)
    structures = {id: Structure.of(blocks[place % len(blocks)], RANK) for place, id in enumerate(ids)}
    secrets = {id: id.encode().ljust(32, b".") for id in ids}
    return session, structures, secrets, {id: identity_of(secret).hex() for id, secret in secrets.items()}


def whole_numbers(cohort: Cohort, opening: Opening, change: np.ndarray) -> np.ndarray:
    """What a client sends of a change, before its masks."""
    most = np.concatenate(
        [np.full(len(one.places), quantum_range(len(one.holders), cohort.bits), np.float32) for one in opening.atoms]
    )
    return quantize(change[opening.order], Scale(0.02 / most, most), np.random.default_rng(1))


def watched(clients: int, timed: Timed) -> tuple[int, int]:
    """(neighbours, bytes beside the masked numbers) of four clients of so many, the most; their time is in `timed`."""
    blocks, draws = four_blocks(), np.random.default_rng(0)
    session, structures, secrets, identities = begun(clients, blocks)
    shape, ids = blocks[0].shape, list(structures)
    every = {
        id: timed(id, partial(SecureClient.begin, session, id, secrets[id], shape, structures[id], 1)) for id in ids
    }
    named, adverts = {one.hash(shape): one for one in structures.values()}, [every[id].kept.own for id in ids]
    cohort, counts = Cohort(session, shape, adverts, named), list[int]()
    signatures = {id: sign(secrets[id], survivors_text(cohort, ids, ids)) for id in ids}
    timed.seconds = {id: timed.seconds[id] for id in ids[: len(blocks)]}
    received = draws.standard_normal(cohort.grid.layout.total, dtype=np.float32)
    sent = sent_hashes(cohort, received)
    for id in timed.seconds:
        client = every[id]
        cohort.order(id, cohort.atoms_of(id))
        sealed = timed(id, partial(client.shares, adverts, named, identities))
        counts.append(len(sealed))
        inbox = {other: draws.bytes(len(content)) for other, content in sealed.items()}
        own = received[cohort.places(id)]

        def upload(client: SecureClient = client, own: np.ndarray = own, inbox: Any = inbox) -> int:
            one = client.cohort()
            opening = client.opening(one, ids, ABOUT, own, sent)
            return len(client.upload(one, inbox, opening, whole_numbers(one, opening, own / 100))[1])

        seeds = timed(id, upload)
        timed(id, partial(client.confirm, ids))
        shares = timed(id, partial(unmasked, client, signatures))
        advert = len(client.kept.own.model_dump_json())
        timed.sent(id, advert + sum(map(len, sealed.values())) + 32 * seeds + 64 + sum(map(len, shares)))
    return max(counts), max(timed.bytes.values())


def of_many(clients: int) -> dict[str, tuple[int, int, float]]:
    """(neighbours, bytes beside, CPU seconds of a client) of so many clients, and were all pairs neighbours."""
    found = {}
    for name, rule in ((str(clients), neighbours.near), (f"{clients}, all pairs", lambda holders, k: None)):
        timed = Timed()
        with patch.object(neighbours, "near", rule):
            count, sent = watched(clients, timed)
        found[name] = count, sent, statistics.median(timed.seconds.values())
        print(f"{name}: {found[name][2]:.3f} s of CPU a client, {count} neighbours, {sent} bytes beside the numbers")
    secret = bytes(32)
    identity, signature, timed = identity_of(secret), sign(secret, ABOUT), Timed()
    for _ in range(2 * clients):
        timed("", partial(is_signed, identity, signature, ABOUT))
    print(f"{timed.seconds['']:.3f} s of it are signatures")
    near = neighbours.near(clients, 3)
    assert near is not None
    for least in (neighbours.opens(2 * near.reach, clients, 3), threshold(clients, 3)):
        shares, timed = shamir.share(1, range(1, least + 1), least), Timed()
        timed("", partial(shamir.reconstruct, shares))
        print(f"the server puts a secret together from {least} shares in {1000 * timed.seconds['']:.1f} ms")
    return found


def secagg() -> dict[str, Any]:
    """The figures of secure sums alone."""
    errors, seconds, ratios, survived = [], {}, [], {}
    for clients in (8, 100):
        timed = Timed()
        error, whole, entries = secure_sum(clients, four_blocks(), {}, timed)
        assert whole
        errors.append(error)
        seconds[clients] = statistics.median(timed.seconds.values())
        ratios.append(max(timed.bytes[id] / (4 * count) for id, count in entries.items()))
        print(f"{clients} clients: {seconds[clients]:.3f} s of CPU a client, upload {ratios[-1]:.3f} of fp32")
        survived[clients] = min(most_gone(clients, phase, errors) for phase in PHASES[2:])
        print(f"{clients} clients: {survived[clients]} may go")
    gone = {f"c{number:03d}": "upload" for number in range(99)}
    error, whole, _ = secure_sum(300, [Coverage.full(SMALL)], gone, Timed())
    assert whole
    errors.append(error)
    many = of_many(1000)
    return {
        "secagg_max_abs_error": max(errors),
        "secagg_upload_ratio": round(max(ratios), 4),
        "secagg_client_cpu_s": {str(clients): round(one, 4) for clients, one in seconds.items()}
        | {name: round(one[2], 4) for name, one in many.items()},
        "secagg_neighbours": {name: one[0] for name, one in many.items()},
        "secagg_beside_bytes": {name: one[1] for name, one in many.items()},
        "dropouts_survived": {str(clients): one for clients, one in survived.items()},
    }


def unmasked(client: SecureClient, signatures: Mapping[str, bytes]) -> list[bytes]:
    """What a client does in the last phase."""
    return client.unmask(client.cohort(), signatures)


def most_gone(clients: int, phase: str, errors: list[int]) -> int:
    """The most that may go before this phase; errors of what opens are added to `errors`."""
    for count in range(-(-clients // 3) - 2, clients):
        gone = {f"c{number:03d}": phase for number in range(count + 1)}
        try:
            error, whole, _ = secure_sum(clients, [Coverage.full(SMALL)], gone, Timed())
        except LegolmError:
            return count
        errors.append(error)
        if not whole:
            return count
    return clients


def tested(name: str, folder: Path | None, changes: Mapping[str, Any]) -> float:
    """The LLM's loss on test data after the same run of the starter's eight languages with these sections changed.

    With a folder it is kept there, and goes on where it was stopped.
    """
    from legolm import config as configs
    from legolm import pipeline
    from legolm.config import RunConfig
    from legolm.data.starter import CLIENT_LANGUAGES

    half = {"method": "structured", "intermediate_size": 768}
    held = zip(CLIENT_LANGUAGES, 4 * ("dense", "half"), strict=True)
    raw: dict[str, Any] = {
        "data": {"train": "starter-languages", "limit_train": 40, "limit_validation": 4, "limit_test": 8},
        "blocks": [{"name": "dense", "method": "dense"}, {"name": "half", **half}],
        "clients": [{"id": id, "block": block} for id, block in held],
        "train": {"steps": 4},
        "federation": {"engine": "local", "rounds": 2},
        "evaluate": {"local_only": False, "others": 0, "every": 2},
    }
    config = configs.validate(RunConfig, raw | dict(changes), "benchmark")
    with tempfile.TemporaryDirectory() as temporary:
        out = (folder or Path(temporary)) / name
        summary = pipeline.run(config, out, out.exists(), store=out.parent / "store", models=False)
    assert summary.llm.loss_after is not None
    return summary.llm.loss_after


def loss(folder: Path | None) -> dict[str, Any]:
    """The same run with and without."""
    plain, secure = (
        tested(name, folder, {"privacy": {"secure": one}}) for name, one in (("plain", None), ("secure", {}))
    )
    print(f"LLM's loss on test data: {plain:.4f} plain, {secure:.4f} with secure sums")
    return {"secagg_loss_ratio": round(secure / plain, 5)}


def loss_at_epsilon(folder: Path | None) -> dict[str, Any]:
    """The same run of few entries at some budgets."""
    few = {"lora": {"rank": 1, "targets": ["v_proj"]}, "aggregate": {"weight": "equal"}}
    of_clients = {"level": "client", "noise": "distributed", "epsilon": 8.0}
    budgets: dict[str, dict[str, Any]] = {
        "none": {},
        "example 8": {"dp": {"level": "example", "epsilon": 8.0}},
        "example 2": {"dp": {"level": "example", "epsilon": 2.0}},
        "client 8, secure sums": {"secure": {}, "dp": of_clients},
    }
    found = {name: tested(name.replace(" ", "-"), folder, few | {"privacy": one}) for name, one in budgets.items()}
    for name, one in found.items():
        print(f"epsilon {name}: LLM's loss on test data {one:.4f}")
    return {"loss_at_epsilon": {name: round(one, 4) for name, one in found.items()}}
