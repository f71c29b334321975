"""What secure sums by atom cost, and that they are exact (`python benchmarks/privacy.py --only secagg loss`).

`secagg`: about a million entries of an adapter, clients with four blocks in equal numbers (the LLM, three quarters and
half of its neurons, half of its KV groups and layers), every phase in this process. `secagg_client_cpu_s` is the
median over clients of the CPU time of all that one client does in a round beside training, at 8 and at 100 clients;
atoms are made once before, as in a run. `secagg_max_abs_error` is against the sum of the same whole numbers in the
clear, with and without clients that go. `dropouts_survived`: how many of 8 and of 100 holders of everything (of a
smaller adapter) may go, at any phase, until the sum does not open any more. `secagg_upload_ratio` is the most of all
clients: all bytes that one sends in a round over its update in fp32.

`loss`: the starter model and data, eight clients, the same run plain and with secure sums; `secagg_loss_ratio` is the
LLM's loss on test data with, over without.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.models import Shape
from legolm.privacy import (
    Scale,
    SecureClient,
    SecureServer,
    Session,
    Structure,
    identity_of,
    quantize,
    quantum_range,
)

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
    ids = [f"c{number:03d}" for number in range(clients)]
    session = Session(run="bench", round=1, k=3, targets=None, rank=RANK, frozen_side=True)
    structures = {id: Structure.of(blocks[place % len(blocks)], RANK) for place, id in enumerate(ids)}
    secrets = {id: id.encode().ljust(32, b".") for id in ids}
    identities = {id: identity_of(secret).hex() for id, secret in secrets.items()}
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
    numbers: dict[str, np.ndarray] = {}
    for id in there("upload"):
        own, change = received[cohort.places(id)], draws.normal(0, 0.01, len(cohort.places(id))).astype(np.float32)

        def upload(id: str = id, own: np.ndarray = own, change: np.ndarray = change) -> tuple[Any, Any, Any]:
            client = at[id]
            opening = client.opening(cohort, server.there, ABOUT, own)
            most = np.concatenate(
                [np.full(len(one.places), quantum_range(len(one.holders), 16), np.float32) for one in opening.atoms]
            )
            found = quantize(change[opening.order], Scale(0.02 / most, most), np.random.default_rng(1))
            whole = np.zeros(cohort.grid.layout.total, dtype=np.int64)
            numbers[id] = whole
            return found, client.upload(cohort, server.inbox(id), opening, found), opening

        found, (words, seeds), opening = timed(id, upload)
        numbers[id][np.concatenate([one.places for one in opening.atoms])] = found
        server.upload(id, words, seeds)
        timed.sent(id, words.nbytes + 32 * len(seeds))
    for id in (id for id in there("confirm") if id in numbers):
        server.confirm(id, timed(id, partial(at[id].confirm, server.survivors)))
        timed.sent(id, 64)
    for id in (id for id in there("unmask") if id in numbers):
        shares = timed(id, partial(unmasked, at[id], server.signatures))
        server.unmask(id, shares)
        timed.sent(id, sum(map(len, shares)))
    opened, closed = server.finish(ABOUT, received)
    plain = [sum(numbers[id][one.atom.places] for id in one.survivors) for one in opened]
    errors = [int(np.abs(one.total - total).max()) for one, total in zip(opened, plain, strict=True)]
    return max(errors, default=0), bool(opened) and not closed, {id: len(cohort.places(id)) for id in at}


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
    return {
        "secagg_max_abs_error": max(errors),
        "secagg_upload_ratio": round(max(ratios), 4),
        "secagg_client_cpu_s": {str(clients): round(one, 4) for clients, one in seconds.items()},
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
