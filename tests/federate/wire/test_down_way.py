"""What the codec loses on the way down does not come back: whole schemes over the wire, without a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from legolm.adapter import Tensors, initial_factors
from legolm.aggregate import Scheme, Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig, Codec, TrainConfig
from legolm.federate import wire
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=6, neurons=5, kv_groups=2, queries_per_group=1, head_dim=3)
FULL, RANK, TARGETS = Coverage.full(SHAPE), 3, ["up_proj", "down_proj"]
TOLD = {"loss_first": 2.0, "loss_last": 1.0, "steps": 4.0, "tokens": 90.0, "seconds": 0.5}


def new(config: AggregateConfig, codec: Codec) -> Scheme:
    scheme = make_scheme(config)
    make = partial(initial_factors, SHAPE, TARGETS, RANK, 0, scheme.frozen_side)
    scheme.begin(Start(SHAPE, make, RANK, server=config, arrived=partial(wire.arrived, name=codec)))
    return scheme


def round_of(scheme: Scheme, codec: Codec, size: float) -> wire.Opened:
    """A round of one client that changes all factors by up to `size`; what it opened."""
    settings = wire.TrainSettings(
        targets=TARGETS, run_rank=RANK, ranks={}, dropout=0.0, train=TrainConfig(), precision="fp32",
        frozen_side=scheme.frozen_side, derived_seed=scheme.derived_seed, proximal=0.0, codec=codec, keep=1.0,
        error_feedback=False,
    )  # fmt: skip
    written = wire.write(settings, FULL, RANK, scheme.payload(FULL, RANK), scheme.fold(FULL, 0))
    asked = wire.TrainRequest(
        run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=RANK, scale=2.0,
        phase="round", round=1, steps=4, done=0, total=4, seed=5, settings=written.settings,
    )  # fmt: skip
    opened = wire.open_(asked, FULL, written.content)
    generator = torch.Generator().manual_seed(0)
    trained = {key: tensor for key, tensor in opened.start.items() if key not in opened.frozen}
    delta = {key: size * torch.randn(tensor.shape, generator=generator) for key, tensor in trained.items()}
    reply, _ = wire.answer(asked, written.content, delta, 7, TOLD, {})
    scheme.add(wire.accept(reply, asked, written).change, FULL)
    scheme.finish()
    return opened


def products(factors: Tensors) -> Tensors:
    names = sorted({key.rpartition(".")[0] for key in factors})
    return {name: factors[f"{name}.B"].double() @ factors[f"{name}.A"].double() for name in names}


@pytest.mark.parametrize("codec", ["int8", "bf16"])
@pytest.mark.parametrize("name", ["heteagg", "fedavg", "hetlora", "flexlora", "raflora", "fedex_lora"])
def test_who_changes_nothing_changes_nothing_whatever_the_codec(name: str, codec: Codec) -> None:
    scheme = new(AggregateConfig(scheme=name), codec)
    round_of(scheme, codec, 0.1)
    before = products(scheme.adapter(FULL, RANK))
    for _ in range(3):
        round_of(scheme, codec, 0.0)
    for key, after in products(scheme.adapter(FULL, RANK)).items():
        torch.testing.assert_close(after, before[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ["int8", "bf16"])
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_the_server_scores_the_base_that_clients_have(name: str, codec: Codec) -> None:
    scheme = new(AggregateConfig(scheme=name), codec)
    for _ in range(2):
        round_of(scheme, codec, 0.1)
    held = scheme.fold(FULL, 0)
    opened = round_of(scheme, codec, 0.1).fold
    assert set(opened) == set(held)
    for key, tensor in opened.items():
        torch.testing.assert_close(tensor, held[key], rtol=1e-6, atol=0)
