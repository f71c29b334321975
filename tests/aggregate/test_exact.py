"""The exact form over several rounds that cover different parts: what stays, and what that costs."""

from __future__ import annotations

import pytest
import torch
from rounds import BLOCKS, FULL, RANK, SHAPE, add, client, new, products

from legolm.adapter import Tensors, parse_key
from legolm.aggregate import Scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig

UP = "layers.0.mlp.up_proj"
HALVES = {
    "lower": Coverage(SHAPE, (0, 1), ((0,), (0,)), ((0, 1), (0, 1))),
    "upper": Coverage(SHAPE, (0, 1), ((1,), (1,)), ((2, 3), (2, 4))),
    "layer 1": BLOCKS["layer 1"],
    "full": FULL,
}


def round_with(scheme: Scheme, names: list[str], seed: int) -> None:
    """A round of two clients, one of them of lower rank, a block of these names each."""
    for place, name in enumerate(names):
        for rank in (RANK, 2):
            add(scheme, client(scheme, HALVES[name], rank, 2 + place, seed=100 * seed + 10 * place + rank))
    scheme.finish()


def applied(scheme: Scheme) -> dict[str, Tensors]:
    """The products that anyone has: blocks of each rank, and the LLM."""
    found = {f"rank {rank}": products(scheme, FULL, rank) for rank in range(1, RANK + 1)}
    for rank in range(1, RANK + 1):
        sent = scheme.payload(FULL, rank)
        found[f"sent {rank}"] = {
            name: sent[f"{name}.B"].double() @ sent[f"{name}.A"].double() for name in found["rank 1"]
        }
    whole = scheme.whole(FULL, RANK)
    found["LLM"] = {name: whole[f"{name}.B"].double() @ whole[f"{name}.A"].double() for name in found["rank 1"]}
    return found


def covers(names: list[str], module: str) -> torch.Tensor:
    """True where one of these blocks holds the entry."""
    layer, kind, _ = parse_key(f"{module}.A")
    held = torch.zeros(SHAPE.matrix(kind), dtype=torch.bool)
    for name in names:
        coverage = HALVES[name]
        if layer in coverage.layers:
            rows, cols = coverage.rows(layer, kind), coverage.cols(layer, kind)
            held[slice(None) if rows is None else rows[:, None], slice(None) if cols is None else cols] = True
    return held


@pytest.mark.parametrize("residual", ["feedback", "fold", "drop"])
@pytest.mark.parametrize("residual_rank", [RANK, 4, 32])
@pytest.mark.parametrize(
    "order",
    [
        [["lower"], ["upper"], ["lower"], ["upper"]],
        [["full"], ["lower"], ["upper"], ["layer 1", "upper"], ["lower"]],
        [["layer 1"], ["lower"], ["full"], ["layer 1"]],
    ],
)
def test_in_no_round_moves_what_nobody_covers_in_the_exact_form(
    residual: str, residual_rank: int, order: list[list[str]]
) -> None:
    settings = {"form": "exact", "residual": residual, "residual_rank": residual_rank}
    scheme = new(AggregateConfig(**settings))
    for number, names in enumerate(order):
        before = applied(scheme)
        round_with(scheme, names, number)
        after = applied(scheme)
        for whose, of_modules in after.items():
            for module, product in of_modules.items():
                covered, old = covers(names, module), before[whose][module]
                torch.testing.assert_close(product[~covered], old[~covered], rtol=1e-5, atol=2e-5)
                assert bool(((product - old)[covered].abs() > 1e-3).any()) == bool(covered.any()), (whose, module)
        again = new(AggregateConfig(**settings), state=scheme.state())
        assert applied(again).keys() == after.keys()


def test_uncovered_rows_cost_the_others_only_what_no_factor_of_this_rank_can_have() -> None:
    """One direction of the lower half stands; the upper half's rows get the best product that keeps it."""
    for module in (UP, "layers.0.mlp.down_proj"):
        scheme = new(AggregateConfig(form="exact"))
        add(scheme, client(scheme, HALVES["lower"], 1, 4, seed=0))
        scheme.finish()
        kept = scheme.payload(FULL, RANK)
        for rank in (RANK, 2):
            add(scheme, client(scheme, HALVES["upper"], rank, 4, seed=rank))
        scheme.finish()
        sent, whole = scheme.payload(FULL, RANK), scheme.whole(FULL, RANK)
        wanted, found = (f[f"{module}.B"].double() @ f[f"{module}.A"].double() for f in (whole, sent))
        held = covers(["upper"], module)
        if module == UP:
            rows, known = held[:, 0], kept[f"{module}.A"].double()
        else:
            rows, known = held[0], kept[f"{module}.B"].double().T
            wanted, found = wanted.T, found.T
        known = known[: standing(kept, module)]
        assert 0 < len(known) < RANK
        x = wanted[rows]
        left = x - x @ torch.linalg.pinv(known) @ known
        least = torch.linalg.svdvals(left)[RANK - len(known) :].norm()
        assert float((x - found[rows]).norm()) == pytest.approx(float(least), rel=1e-3, abs=1e-5)


def standing(factors: Tensors, module: str) -> int:
    """Directions that a module's factors have."""
    return int((factors[f"{module}.A"].any(1) & factors[f"{module}.B"].any(0)).sum())
