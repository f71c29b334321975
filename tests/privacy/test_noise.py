"""Clipping, the sensitivity of a round's sum, and noise: by hand and as properties."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "aggregate"))
from rounds import BLOCKS, FULL, RANK, new

from legolm.adapter import Change, Tensors
from legolm.aggregate import Scheme, Weighing
from legolm.block import Coverage
from legolm.config import AggregateConfig
from legolm.privacy import clipped, gaussian, norm, with_share

EQUAL = AggregateConfig(weight="equal")


def test_a_change_is_scaled_to_the_bound_over_all_its_tensors() -> None:
    delta = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[0.0, 4.0]])}
    assert norm(delta) == 5
    found = clipped(delta, 2.5)
    torch.testing.assert_close(found["b"], torch.tensor([[0.0, 2.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["a"], torch.tensor([[1.5]]), atol=1e-5, rtol=0)
    assert clipped(delta, 5.0) is delta


@given(bound=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32), scale=st.floats(1e-6, 1e4))
@settings(max_examples=60)
def test_rounding_leads_nowhere_above_the_bound(bound: float, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = {key: scale * torch.randn(7, 5, generator=generator) for key in "ab"}
    assert norm(clipped(delta, bound)) <= bound


def total(scheme: Scheme) -> torch.Tensor:
    """N of the round under way."""
    return scheme._buffer.clone()  # type: ignore[attr-defined]


def change(scheme: Scheme, coverage: Coverage, rank: int, seed: int, size: float, bound: float) -> Change:
    generator = torch.Generator().manual_seed(seed)
    sent = scheme.payload(coverage, rank)
    delta = {key: size * torch.randn(one.shape, generator=generator) for key, one in sent.items()}
    return Change(clipped(delta, bound), sent, 1, rank)


@given(data=st.data(), form=st.sampled_from(["factor", "frozen_side"]), bound=st.floats(0.01, 10))
@settings(max_examples=40)
def test_one_client_moves_the_sum_by_at_most_the_bound(data: st.DataObject, form: str, bound: float) -> None:
    """Without it by C, with another in its place by 2 C; whatever blocks and ranks there are."""
    config = AggregateConfig(weight="equal", form=form)  # type: ignore[call-arg]
    who = st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, RANK), st.integers(0, 99), st.floats(0.001, 1000))
    there = data.draw(st.lists(who, min_size=1, max_size=4))
    block, rank, _, _ = there[-1]
    other = (block, rank, data.draw(st.integers(100, 199)), data.draw(st.floats(0.001, 1000)))

    def sums(clients: list[tuple[str, int, int, float]]) -> torch.Tensor:
        scheme = new(config)
        for name, own, seed, size in clients:
            scheme.add(change(scheme, BLOCKS[name], own, seed, size, bound), BLOCKS[name])
        return total(scheme)

    whole = sums(there)
    assert float((whole - sums(there[:-1])).norm()) <= bound * (1 + 1e-12)
    assert float((whole - sums([*there[:-1], other])).norm()) <= 2 * bound * (1 + 1e-12)


def test_who_is_silent_counts_in_the_mean() -> None:
    """Of two holders one is silent: the other's change counts half, as if that one had learned nothing."""
    found: list[Tensors] = []
    for nothing in ({}, None):
        scheme = new(EQUAL)
        weighing = Weighing(EQUAL, scheme)
        sent = scheme.payload(FULL, RANK)
        weighing.add("one", Change({key: torch.ones_like(one) for key, one in sent.items()}, sent, 5, RANK), FULL)
        zero = {key: torch.zeros_like(one) for key, one in sent.items()} if nothing is None else nothing
        weighing.add("two", Change(zero, sent, 1, RANK), FULL)
        weighing.finish()
        found.append({key: one - sent[key] for key, one in scheme.payload(FULL, RANK).items()})
    for key, step in found[0].items():
        torch.testing.assert_close(step, torch.full_like(step, 0.5))
        assert torch.equal(step, found[1][key])


def test_noise_is_on_the_sum_and_divided_with_it() -> None:
    """Where two hold an entry the mean has half the noise that it has where one does; where nobody does, none."""
    scheme = new(EQUAL)
    before = scheme.payload(FULL, RANK)
    for name in ("narrow", "full"):
        sent = scheme.payload(BLOCKS[name], 1)
        scheme.add(Change({key: torch.zeros_like(one) for key, one in sent.items()}, sent, 1, 1), BLOCKS[name])
    scheme.disturb(lambda shape: torch.ones(*shape, dtype=torch.float64))
    scheme.finish()
    step = scheme.payload(FULL, RANK)["layers.0.mlp.up_proj.B"] - before["layers.0.mlp.up_proj.B"]
    expected = torch.tensor([1.0, 0.5, 1.0, 0.5, 0.5])  # neurons 1, 3 and 4 are held twice
    torch.testing.assert_close(step[:, 0], expected)
    assert not step[:, 1:].any()  # rank rows that nobody holds


def test_noise_is_normal_and_another_each_time() -> None:
    found = gaussian((200, 501)).flatten()
    count = len(found)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert abs(float(found.mean())) < 5 / math.sqrt(count)
    assert abs(float(found.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((found > 1.6448536).double().mean()) - 0.05) < 5 * math.sqrt(0.05 * 0.95 / count)
    assert abs(float((found[::2][: count // 2] * found[1::2][: count // 2]).mean())) < 5 / math.sqrt(count / 2)
    assert not torch.equal(found, gaussian((200, 501)).flatten())
    assert gaussian((0, 3)).shape == (0, 3)


def test_parts_of_the_noise_are_enough_without_those_that_drop_out() -> None:
    """Eight hold the first column, three the second, one the third; two may be lost."""
    holders = {"b": torch.tensor([8.0, 3.0, 1.0]).expand(20_000, 3)}
    parts = [with_share({"b": torch.zeros(20_000, 3)}, 2.0, holders, dropouts=2)["b"] for _ in range(8)]
    for column, there, variance in [(0, 6, 4), (0, 8, 4 * 8 / 6), (1, 1, 4), (2, 1, 4)]:
        found = torch.stack([part[:, column] for part in parts[:there]]).sum(0).square().mean()
        assert abs(float(found) / variance - 1) < 0.06
