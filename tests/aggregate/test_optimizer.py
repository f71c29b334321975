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
    # v begins at τ² = 1.
    m, v = 0.5 * 4, 0.75 * 1 + 0.25 * 16 if kind == "fedadam" else 1 + 0.25 * 16
    step = 0.1 * m / (math.sqrt(v) + 1)
    assert first == pytest.approx([step, step])
    m = 0.5 * m + 0.5 * 2
    v = 0.75 * v + 0.25 * 4 if kind == "fedadam" else v - 0.25 * 4 * (1 if v > 4 else -1 if v < 4 else 0)
    assert second == pytest.approx([step + 0.1 * m / (math.sqrt(v) + 1), step])


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
def test_by_default_an_adaptive_server_moves_by_the_size_of_a_clients_change(kind: str) -> None:
    first, second = two_rounds(kind, (0.01, 0.01))
    # By algorithm 2 with β1 0.9, β2 0.99, τ 0.001 and η 0.01: m = 0.001; v = 0.99e-6 + 1e-6, of Yogi 1e-6 + 1e-6.
    v = 1.99e-6 if kind == "fedadam" else 2e-6
    assert first[0] == pytest.approx(0.01 * 0.001 / (math.sqrt(v) + 0.001), rel=1e-5)
    assert 0.002 < first[0] < 0.01
    assert 0.002 < second[0] - first[0] < 0.01


def test_other_servers_go_the_whole_way_by_default() -> None:
    assert [two_rounds(kind, (4.0, 2.0))[0][0] for kind in ("none", "fedavgm")] == [4.0, 4.0]
