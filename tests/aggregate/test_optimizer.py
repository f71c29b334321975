"""Server optimizers: two steps by hand, and state only where somebody trained."""

from __future__ import annotations

import math

import pytest
import torch

from legolm.adapter import Change, Tensors, initial_factors
from legolm.aggregate import Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.models import Shape

SHAPE = Shape("llama", layers=1, hidden=2, neurons=2, kv_groups=1, queries_per_group=1, head_dim=2)
KEY = "layers.0.mlp.up_proj.B"
FULL = Coverage.full(SHAPE)
FIRST = Coverage(SHAPE, (0,), ((0,),), ((0,),))


def two_rounds(kind: str, gradients: tuple[float, float], **settings: float) -> list[list[float]]:
    """B of up_proj after each of two rounds: both neurons train in the first, only neuron 0 in the second."""
    config = AggregateConfig(form="factor", server_optimizer=kind, **settings)  # type: ignore[arg-type]
    scheme = make_scheme(config)
    scheme.begin(Start(SHAPE, lambda: initial_factors(SHAPE, ["up_proj"], 1, 0), 1, server=config))
    found = []
    for coverage, value in zip((FULL, FIRST), gradients, strict=True):
        sent = scheme.payload(coverage, 1)
        delta: Tensors = {key: torch.full_like(tensor, value) for key, tensor in sent.items()}
        scheme.add(Change(delta, sent, 3, 1), coverage)
        scheme.finish()
        found.append(scheme.state()[KEY].flatten().tolist())
    return found


def test_fedavgm() -> None:
    # v = 0.5 v + g; θ += 0.1 v.
    assert two_rounds("fedavgm", (4.0, 2.0), server_momentum=0.5, server_learning_rate=0.1) == [
        pytest.approx([0.4, 0.4]),
        pytest.approx([0.8, 0.4]),
    ]


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
def test_adaptive(kind: str) -> None:
    settings = {"server_momentum": 0.5, "server_beta2": 0.75, "server_tau": 1.0, "server_learning_rate": 0.1}
    first, second = two_rounds(kind, (4.0, 2.0), **settings)
    m, v = 0.5 * 4, 0.25 * 16
    step = 0.1 * m / (math.sqrt(v) + 1)
    assert first == pytest.approx([step, step])
    m = 0.5 * m + 0.5 * 2
    v = 0.75 * v + 0.25 * 4 if kind == "fedadam" else v - 0.25 * 4 * (1 if v > 4 else -1 if v < 4 else 0)
    assert second == pytest.approx([step + 0.1 * m / (math.sqrt(v) + 1), step])
