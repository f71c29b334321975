"""What a speed-up leaves: time told from layers and weights, and the shapes that keep within it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from legolm.block import Base
from legolm.config import BlockConfig
from legolm.models import load_config
from legolm.prune.speed import Clock, read_clock, speedup
from legolm.prune.target import shapes_within


def test_time_is_told_from_layers_and_weights() -> None:
    clock = Clock(fixed=1.0, layer=0.5, weight=0.01)
    assert clock.seconds(4, 100) == pytest.approx(1 + 4 * 0.5 + 100 * 0.01)
    assert clock.weights(4.0, 4) == pytest.approx(100)
    assert clock.weights(4.0, 2) == pytest.approx(200)  # two layers fewer leave one second more
    assert clock.weights(4.0, 7) < 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_clock_is_read_of_any_family(family: str, tiny: Callable[[str], Path]) -> None:
    base = Base.of(tiny(family), "", load_config(tiny(family)))
    clock = read_clock(base)  # of five layers too, where the model has two, of two kinds
    assert clock.fixed >= 0 and clock.layer >= 0 and clock.weight > 0
    assert speedup(base, base.shape) > 0


def test_shapes_within_a_time_use_it_up(tiny: Callable[[str], Path]) -> None:
    base = Base.of(tiny("llama"), "", load_config(tiny("llama")))
    shape = base.shape
    # Two of three parts are the calls of the layers: no width makes two layers as fast as one.
    clock = Clock(fixed=0.0, layer=shape.layer_weights * 2.0, weight=1.0)
    whole = clock.seconds(shape.layers, shape.layers * shape.layer_weights)
    for factor, layers in ((1.2, 2), (2.2, 1)):
        block = BlockConfig(name="b", method="structured", speedup=factor)
        wanted = whole / factor
        found = shapes_within(block, base, lambda count, wanted=wanted: clock.weights(wanted, count))  # type: ignore[misc]
        assert {small.layers for small in found} == {layers}
        for small in found:
            assert clock.seconds(small.layers, small.layers * small.layer_weights) <= wanted
            if small.neurons < shape.neurons:  # eight more neurons would be too slow
                more = small.layers * (small.layer_weights + 8 * 3 * shape.hidden)
                assert clock.seconds(small.layers, more) > wanted
