"""Rounds of a scheme on an LLM of two tiny layers, by hand: what the tests of schemes share."""

from __future__ import annotations

from functools import partial

import torch
from dense_reference import Client

from legolm.adapter import Change, Tensors, initial_factors, slice_factors
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=6, neurons=5, kv_groups=2, queries_per_group=1, head_dim=3)
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
RANK = 3
FULL = Coverage.full(SHAPE)
BLOCKS = {
    "full": FULL,
    "layer 1": Coverage(SHAPE, (1,), ((0,),), ((0, 2),)),
    "narrow": Coverage(SHAPE, (0, 1), ((1,), (0, 1)), ((1, 3, 4), (1, 2))),
    "masked": Coverage(
        SHAPE, FULL.layers, FULL.groups, FULL.neurons,
        {"layers.1.mlp.up_proj": torch.arange(30).view(5, 6) % 3 > 0},
    ),
}  # fmt: skip
STRUCTURED = ("full", "layer 1", "narrow")


def new(config: AggregateConfig, rank: int = RANK, state: Tensors | None = None) -> Scheme:
    scheme = make_scheme(config)
    make = partial(initial_factors, SHAPE, TARGETS, rank, 0, scheme.frozen_side)
    scheme.begin(Start(SHAPE, make, rank, server=config), state)
    return scheme


def client(scheme: Scheme, coverage: Coverage, rank: int, n: int, seed: int) -> Client:
    generator = torch.Generator().manual_seed(seed)
    sent = scheme.payload(coverage, rank)
    if not sent:  # FLoRA: the client makes its adapter itself
        assert scheme.derived_seed is not None
        sent = slice_factors(coverage, initial_factors(SHAPE, TARGETS, RANK, scheme.derived_seed + seed), rank)
    delta = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in sent.items()}
    return Client(coverage, rank, n, sent, delta)


def add(scheme: Scheme, one: Client) -> None:
    scheme.add(Change(one.delta, one.received, one.n, one.rank), one.coverage)


def products(scheme: Scheme, coverage: Coverage = FULL, rank: int = RANK) -> Tensors:
    """B A of every module, float64."""
    found = scheme.adapter(coverage, rank)
    names = {key.rpartition(".")[0] for key in found}
    return {name: found[f"{name}.B"].double() @ found[f"{name}.A"].double() for name in sorted(names)}


def close(found: Tensors, expected: Tensors, tolerance: float = 2e-5) -> None:
    assert set(found) == set(expected)
    for key in expected:
        torch.testing.assert_close(found[key].double(), expected[key].double(), rtol=tolerance, atol=tolerance)
