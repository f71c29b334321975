"""Hostile clients against defences under coverage: section `attacks` of `privacy.py`.

Synthetic: twelve clients on four blocks of a tiny LLM learn one linear target. In each of 20 rounds an honest client's
change is a step from the global adapter towards the target, of its own bias and noise; a quarter of the clients is
hostile and knows what the honest ones send. The error is the mean square of what is left
to the target over all entries (`llm`) and over the worst block's, relative to the start: 1 is nothing learned. What
needs a model (label flip, backdoor) is here as what it does to an update: it pulls towards another target, all of it
or in one tenth of the entries, whose share of the way is then `backdoor`'s error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, initial_factors, slice_factors
from legolm.aggregate import Scheme, Start, Weighing, held_by, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape
from legolm.privacy import clipped, norm

SHAPE = Shape("llama", layers=2, hidden=16, neurons=24, kv_groups=2, queries_per_group=1, head_dim=8)
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
RANK, ROUNDS, CLIENTS, HOSTILE = 4, 20, 12, 3
DIVERGED = 1000.0
"""Errors beyond this are this."""
STEP, BIAS, NOISE = 0.3, 0.3, 0.3
"""Share of the way that an honest client goes; its own direction and noise beside the target's entries (of size 1)."""

DEFENCES: dict[str, dict[str, Any]] = {
    "mean": {"weight": "equal"},
    "mean, clipped": {"weight": "equal"},
    "median": {"scheme": "median"},
    "trimmed_mean": {"scheme": "trimmed_mean", "trim": 0.25},
    "multi_krum": {"scheme": "multi_krum", "hostile": 0.25},
    "nearest_mixing": {"scheme": "nearest_mixing", "hostile": 0.25},
}


@dataclass(frozen=True)
class Seen:
    """What a hostile client knows: what it would honestly send, what the others send, its coverage; the last round."""

    own: Tensors
    honest: list[tuple[Tensors, Coverage]]
    coverage: Coverage
    thin: Tensors
    """1 where at most three hold an entry, in its slice."""
    received: Tensors
    other: Tensors
    """Another target than everyone's, in its slice."""
    generator: torch.Generator

    def moments(self) -> tuple[Tensors, Tensors]:
        """Mean and standard deviation of the honest changes at each entry, in its slice; its own where it is alone."""
        mean, std = {}, {}
        full = {key: torch.full(shape, torch.nan) for key, shape in shapes().items()}
        for key, own in self.own.items():
            there = []
            for delta, coverage in self.honest:
                if key in delta:
                    value = full[key].clone()
                    place(coverage, key, value, delta[key])
                    there.append(slice_factors(self.coverage, {key: value}, RANK)[key])
            stacked = torch.stack(there) if there else own[None]
            mean[key] = stacked.nanmean(0).where(~stacked.isnan().all(0), own)
            std[key] = (stacked - mean[key]).square().nanmean(0).nan_to_num(0).sqrt()
        return mean, std


def shapes() -> dict[str, tuple[int, int]]:
    return {key: (len(one), one.shape[1]) for key, one in initial_factors(SHAPE, TARGETS, RANK, 0, False).items()}


def place(coverage: Coverage, key: str, into: Tensor, value: Tensor) -> None:
    from legolm.aggregate.weight import Placement

    index = Placement.of(coverage).index(key)
    if key.endswith("A"):
        into[:, slice(None) if index is None else index] = value
    else:
        into[slice(None) if index is None else index] = value


def scaled(factor: float, seen: Seen) -> Tensors:
    return {key: factor * one for key, one in seen.own.items()}


def random(seen: Seen) -> Tensors:
    return {key: torch.randn(one.shape, generator=seen.generator) for key, one in seen.own.items()}


def not_a_number(seen: Seen) -> Tensors:
    return {key: torch.full_like(one, torch.nan) for key, one in seen.own.items()}


def label_flip(seen: Seen) -> Tensors:
    """Training on wrong labels: towards another target."""
    return {key: STEP * (seen.other[key] - seen.received[key]) for key in seen.own}


def alie(seen: Seen) -> Tensors:
    """A little is enough (Baruch et al., NeurIPS 2019): as far from the mean as the spread hides."""
    mean, std = seen.moments()
    return {key: mean[key] - 1.0 * std[key] for key in mean}


def ipm(seen: Seen) -> Tensors:
    """Inner product manipulation (Xie et al., UAI 2019)."""
    return {key: -1.5 * one for key, one in seen.moments()[0].items()}


def mimic(seen: Seen) -> Tensors:
    """All hostile clients send what one honest client sends (Karimireddy et al., ICLR 2022)."""
    delta, coverage = seen.honest[0]
    full = {key: torch.zeros(shape) for key, shape in shapes().items()}
    for key, one in delta.items():
        place(coverage, key, full[key], one)
    return {key: one for key, one in slice_factors(seen.coverage, full, RANK).items() if key in seen.own}


def free_rider(seen: Seen) -> Tensors:
    """Nothing learned, a little noise to look alive."""
    return {key: 1e-3 * torch.randn(one.shape, generator=seen.generator) for key, one in seen.own.items()}


def backdoor(seen: Seen) -> Tensors:
    """Honest but in a tenth of the entries, pulled to another target and boosted to win the mean."""
    found = {}
    for key, own in seen.own.items():
        bad = trigger(own)
        found[key] = torch.where(bad, 4 * STEP * (seen.other[key] - seen.received[key]), own)
    return found


def trigger(like: Tensor) -> Tensor:
    return (torch.arange(like.numel()) % 10 == 0).view_as(like)


def thin_coordinates(seen: Seen) -> Tensors:
    """Honest where many hold, a reversed tenfold step where at most three do."""
    return {key: torch.where(seen.thin[key] > 0, -10 * one, one) for key, one in seen.own.items()}


ATTACKS: dict[str, Callable[[Seen], Tensors]] = {
    "none": lambda seen: seen.own,
    "sign flip": partial(scaled, -1.0),
    "times ten": partial(scaled, 10.0),
    "noise": random,
    "nan": not_a_number,
    "label flip": label_flip,
    "alie": alie,
    "ipm": ipm,
    "mimic": mimic,
    "free rider": free_rider,
    "replay": lambda seen: seen.own,
    "backdoor": backdoor,
    "thin coordinates": thin_coordinates,
}


def blocks() -> list[Coverage]:
    both = (0, 1)
    return [
        Coverage.full(SHAPE),
        Coverage(SHAPE, both, ((0, 1),) * 2, (tuple(range(0, 24, 2)),) * 2),
        Coverage(SHAPE, both, ((0,), (1,)), (tuple(range(8)),) * 2),
        Coverage(SHAPE, (1,), ((0, 1),), (tuple(range(12)),)),
    ]


@dataclass
class Outcome:
    """Errors relative to the start, of the backdoor's entries to their target, and the server's seconds a round."""

    llm: float
    worst_block: float
    by_holders: dict[int, float]
    server_s: float
    backdoor: float | None


def play(defence: str, attack: str, seed: int) -> Outcome:
    """One federation. Hostile are the last three clients; for `thin coordinates` two of three who hold all, and one."""
    generator = torch.Generator().manual_seed(seed)
    config = AggregateConfig.model_validate(DEFENCES[defence])
    scheme = make_scheme(config)
    start = initial_factors(SHAPE, TARGETS, RANK, seed, scheme.frozen_side)
    scheme.begin(Start(SHAPE, lambda: dict(start), RANK, seed, server=config))
    whole = Coverage.full(SHAPE)
    trained = sorted(scheme.payload(whole, RANK))
    target = {key: torch.randn(start[key].shape, generator=generator) for key in trained}
    other = {key: torch.randn(start[key].shape, generator=generator) for key in trained}
    held = [blocks()[client % 4] for client in range(CLIENTS)]
    bad = set(range(CLIENTS - HOSTILE, CLIENTS)) if attack != "thin coordinates" else {0, 4, 1}
    counts = held_by({key: (len(start[key]), start[key].shape[1]) for key in trained}, [(one, RANK) for one in held])
    bias = [{k: BIAS * torch.randn(start[k].shape, generator=generator) for k in trained} for _ in held]
    old: dict[int, Tensors] = {}
    seconds, sizes = 0.0, list[float]()
    for _ in range(ROUNDS):
        sent: dict[int, Tensors] = {}
        for client, coverage in enumerate(held):
            goal = slice_factors(coverage, {k: target[k] + bias[client][k] for k in trained}, RANK)
            now = scheme.payload(coverage, RANK)
            sent[client] = {
                k: STEP * (goal[k] - now[k]) + STEP * NOISE * torch.randn(now[k].shape, generator=generator)
                for k in now
            }
        honest = [(sent[client], held[client]) for client in sent if client not in bad]
        for client in bad:
            coverage = held[client]
            thin = {key: (counts[key] <= CLIENTS // 4).float() for key in trained}
            seen = Seen(
                sent[client], honest, coverage, slice_factors(coverage, thin, RANK), scheme.payload(coverage, RANK),
                slice_factors(coverage, other, RANK), generator,
            )  # fmt: skip
            sent[client] = old.setdefault(client, sent[client]) if attack == "replay" else ATTACKS[attack](seen)
        seconds += aggregate(defence, config, scheme, sent, held, sizes)
    return measured(scheme, start, target, other, counts, held, trained, seconds / ROUNDS, attack)


def aggregate(
    defence: str,
    config: AggregateConfig,
    scheme: Scheme,
    sent: dict[int, Tensors],
    held: list[Coverage],
    sizes: list[float],
) -> float:
    """As the server does: what is not finite is refused at the door; `mean, clipped` clips to the usual length."""
    began, weighing = time.process_time(), Weighing(config, scheme)
    usual = sorted(sizes)[len(sizes) // 2] if sizes else None
    for client, delta in sent.items():
        if not all(bool(one.isfinite().all()) for one in delta.values()):
            continue
        size = norm(delta) / sum(one.numel() for one in delta.values()) ** 0.5
        sizes.append(size)
        if defence == "mean, clipped" and usual is not None:
            delta = dict(clipped(delta, norm(delta) * min(1.0, 1.5 * usual / size)))
        weighing.add(str(client), Change(delta, {}, 1, RANK), held[client])
    weighing.finish()
    return time.process_time() - began


def measured(
    scheme: Scheme, start: Tensors, target: Tensors, other: Tensors, counts: Tensors, held: list[Coverage],
    trained: list[str], server_s: float, attack: str,
) -> Outcome:  # fmt: skip
    found = scheme.payload(Coverage.full(SHAPE), RANK)
    left = {key: (found[key] - target[key]).square() for key in trained}
    begun = {key: (start[key] - target[key]).square() for key in trained}
    flat = torch.cat([left[key].flatten() for key in trained])
    scale = float(torch.cat([begun[key].flatten() for key in trained]).mean())
    number = torch.cat([counts[key].flatten() for key in trained]).int()
    own = [torch.cat([one.flatten() for one in slice_factors(cov, left, RANK).values()]).mean() for cov in held[:4]]
    door = None
    if attack == "backdoor":
        near = torch.cat([(found[k] - other[k]).square()[trigger(found[k])] for k in trained]).mean()
        far = torch.cat([(target[k] - other[k]).square()[trigger(found[k])] for k in trained]).mean()
        door = float(near / far)
    by_holders = {int(n): float(flat[number == n].mean()) / scale for n in set(number.tolist()) if n}
    errors = [min(float(one) / scale, DIVERGED) for one in (flat.mean(), max(own))]
    return Outcome(errors[0], errors[1], {n: min(one, DIVERGED) for n, one in by_holders.items()}, server_s, door)


def attacks(seeds: int) -> dict[str, Any]:
    """Defence by attack, means over seeds; and the worst attack of each defence."""
    table: dict[str, Any] = {}
    for defence in DEFENCES:
        rows: dict[str, Any] = {}
        for attack in ATTACKS:
            found = [play(defence, attack, seed) for seed in range(seeds)]
            rows[attack] = {
                "llm": round(fmean(one.llm for one in found), 4),
                "worst_block": round(fmean(one.worst_block for one in found), 4),
                "by_holders": {n: round(fmean(o.by_holders[n] for o in found), 4) for n in found[0].by_holders},
                "server_s": round(fmean(one.server_s for one in found), 5),
            }
            if found[0].backdoor is not None:
                rows[attack]["to_the_backdoor"] = round(fmean(one.backdoor or 0.0 for one in found), 4)
        worst = max(rows, key=lambda attack: rows[attack]["worst_block"])
        table[defence] = {"worst_attack": worst, "cost_without_attack": rows["none"]["llm"], "attacks": rows}
        line = ", ".join(f"{attack} {one['llm']:.3g}/{one['worst_block']:.3g}" for attack, one in rows.items())
        print(f"{defence}: {line}; worst {worst}", flush=True)
    return table
