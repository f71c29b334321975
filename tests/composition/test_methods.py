"""Methods on one matrix: numbers by hand, and TIES and the sums against loops in float64."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from legolm.block import Coverage
from legolm.composition import choose_method
from legolm.composition.methods import Part
from legolm.errors import LegolmError
from legolm.models import Shape

SHAPE = Shape("llama", layers=1, hidden=4, neurons=5, kv_groups=1, queries_per_group=1, head_dim=4)
UP, DOWN = "mlp.up_proj", "mlp.down_proj"
METHODS = {
    "exact": choose_method("heteagg", None, None, None),
    "factor": choose_method("heteagg", "factor", None, None),
    "task_arithmetic": choose_method("task_arithmetic", None, 0.5, None),
    "ties": choose_method("ties", None, 0.7, 0.4),
}


def coverage(neurons: tuple[int, ...], mask: Tensor | None = None) -> Coverage:
    return Coverage(SHAPE, (0,), ((0,),), (neurons,), {} if mask is None else {f"layers.0.{UP}": mask})


def part(module: str, neurons: tuple[int, ...], weight: float, seed: int, masked: bool = False) -> Part:
    generator = torch.Generator().manual_seed(seed)
    held = coverage(neurons)
    rows, cols = held.matrix(0, module)
    mask = torch.rand(rows, cols, generator=generator) < 0.5 if masked and module == UP else None
    rank = 1 + seed % 2
    a, b = torch.randn(rank, cols, generator=generator), torch.randn(rows, rank, generator=generator)
    return Part(coverage(neurons, mask), 0, module, a, b, weight)


def placed(one: Part) -> list[list[float | None]]:
    """The change in the LLM's coordinates, None where the block holds nothing."""
    rows, cols = SHAPE.matrix(one.module)
    full: list[list[float | None]] = [[None] * cols for _ in range(rows)]
    product = one.b.double() @ one.a.double()
    neurons = one.coverage.neurons[0]
    for i, neuron in enumerate(neurons):
        for j in range(4):
            if one.module == DOWN:
                full[j][neuron] = float(product[j, i])
            elif one.mask is None or bool(one.mask[i, j]):
                full[neuron][j] = float(product[i, j])
    return full


def reference(name: str, parts: list[Part]) -> Tensor:
    """Entry by entry, from the papers' words."""
    rows, cols = SHAPE.matrix(parts[0].module)
    result = torch.zeros(rows, cols, dtype=torch.float64)
    changes = [placed(one) for one in parts]
    edges = []
    for change in changes:
        sizes = sorted((abs(value) for line in change for value in line if value is not None), reverse=True)
        edges.append(sizes[max(1, round(0.4 * len(sizes))) - 1] if sizes else math.inf)
    for i in range(rows):
        for j in range(cols):
            here = [(one.weight, change[i][j], edge) for one, change, edge in zip(parts, changes, edges, strict=True)]
            known = [(weight, value, edge) for weight, value, edge in here if value is not None]
            if name == "exact" and known:
                result[i, j] = sum(w * v for w, v, _ in known) / sum(w for w, *_ in known)
            elif name == "task_arithmetic":
                result[i, j] = 0.5 * sum(w * v for w, v, _ in known)
            elif name == "ties":
                kept = [(w, v) for w, v, edge in known if abs(v) >= edge]
                vote = sum(w * v for w, v in kept)
                agree = [(w, v) for w, v in kept if v * vote > 0]
                if agree:
                    result[i, j] = 0.7 * sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return result


drawn = st.lists(
    st.tuples(
        st.sets(st.integers(0, 4), min_size=1).map(lambda found: tuple(sorted(found))),
        st.sampled_from([0.5, 1.0, 3.0]),
        st.integers(0, 99),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", ["exact", "task_arithmetic", "ties"])
@given(module=st.sampled_from([UP, DOWN]), many=drawn)
@settings(max_examples=30)
def test_against_loops_in_float64(name: str, module: str, many: list) -> None:  # type: ignore[type-arg]
    parts = [part(module, *one) for one in many]
    torch.testing.assert_close(METHODS[name].combine(parts), reference(name, parts), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@given(module=st.sampled_from([UP, DOWN]), many=drawn, shuffle=st.randoms())
@settings(max_examples=15)
def test_order_changes_nothing(name: str, module: str, many: list, shuffle: random.Random) -> None:  # type: ignore[type-arg]
    parts = [part(module, *one) for one in many]
    shuffled = list(parts)
    shuffle.shuffle(shuffled)
    one, two = METHODS[name].combine(parts), METHODS[name].combine(shuffled)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_ties_by_hand() -> None:
    # Rows are neurons; of each block's 4 entries the larger half stays. Block 1 keeps 4 and -3, block 2 -6 and -2.
    def row(values: list[float], neuron: int, weight: float) -> Part:
        return Part(coverage((neuron,)), 0, UP, torch.tensor([values]), torch.ones(1, 1), weight)

    ties = choose_method("ties", None, None, 0.5)
    found = ties.combine([row([4.0, 1.0, -3.0, 0.5], 2, 1.0), row([-6.0, 0.1, -2.0, 1.0], 2, 1.0)])
    # Entry 0: the sum is -2, so -6 alone; entry 2: both agree, -2.5; the others were trimmed.
    assert found[2].tolist() == [-6.0, 0.0, -2.5, 0.0]
    assert not bool(found[[0, 1, 3, 4]].any())
    # Weighted 3 to 1 the first block wins entry 0: 12 against 6.
    found = ties.combine([row([4.0, 1.0, -3.0, 0.5], 2, 3.0), row([-6.0, 0.1, -2.0, 1.0], 2, 1.0)])
    assert found[2].tolist() == [4.0, 0.0, (3 * -3 + -2) / 4, 0.0]


def test_one_full_block_with_scaling_1_is_its_delta() -> None:
    one = part(UP, (0, 1, 2, 3, 4), 1.0, seed=3)
    product = one.b.double() @ one.a.double()
    for method in (METHODS["exact"], METHODS["factor"], choose_method("task_arithmetic", None, None, None)):
        torch.testing.assert_close(method.combine([one]), product, rtol=1e-6, atol=1e-6)
    assert torch.equal(choose_method("ties", None, None, 1.0).combine([one]), product)


@pytest.mark.parametrize("scaling", [math.nan, math.inf])
def test_a_scaling_that_is_no_number(scaling: float) -> None:
    with pytest.raises(LegolmError, match="must be a finite number"):
        choose_method("ties", None, scaling, None)


def test_settings_are_those_of_their_method() -> None:
    for chosen, says in (
        (("tie", None, None, None), "did you mean `ties`"),
        (("heteagg", None, 1.0, None), "--scaling 1.0: is for task_arithmetic and ties"),
        (("ties", "exact", None, None), "--form exact: is for heteagg"),
        (("ties", None, None, 0.0), "above 0 and at most 1"),
        (("heteagg", "frozen", None, None), "must be exact or factor"),
    ):
        with pytest.raises(LegolmError, match=re.escape(says)):
            choose_method(*chosen)
