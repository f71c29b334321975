"""Which shape a budget gets, from costs that a person can add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from legolm.models import Shape
from legolm.prune.allocate import LAYER_WEIGHT, Costs, choose

WHOLE = Shape("llama", layers=4, hidden=64, neurons=96, kv_groups=2, queries_per_group=2, head_dim=16)
CURVE = ((96, 0.0), (48, 0.1), (0, 0.5))
"""Share of energy lost with so many neurons left, the same in every layer."""


def test_a_cost_is_the_sum_of_what_goes() -> None:
    costs = Costs({"neuron": (CURVE,) * 4}, layers=(0.4, 0.1, 0.2, 0.3))
    assert costs.of(WHOLE) == 0
    assert costs.of(replace(WHOLE, neurons=48)) == pytest.approx(4 * 0.1)
    assert costs.of(replace(WHOLE, neurons=24)) == pytest.approx(4 * 0.3)  # halfway between two points
    assert costs.kept_layers(2) == (0, 3)  # the dearest to lose
    assert costs.of(replace(WHOLE, layers=2, neurons=48)) == pytest.approx(2 * 0.1 + LAYER_WEIGHT * (0.1 + 0.2))


@pytest.mark.parametrize(("more", "layers"), [(0.99, 3), (1.0, 3), (1.01, 3), (1.03, 4)])
def test_of_shapes_as_good_the_shallower_is_taken(more: float, layers: int) -> None:
    deep, shallow = replace(WHOLE, neurons=48), replace(WHOLE, layers=3)
    # The shallow one costs `more` times the deep one's 0.4.
    costs = Costs({"neuron": (CURVE,) * 4}, layers=(0.4 * more / LAYER_WEIGHT, 9, 9, 9))
    assert costs.of(shallow) == pytest.approx(0.4 * more)
    assert choose([deep, shallow], costs).layers == layers
