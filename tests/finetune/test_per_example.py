"""Gradients by example against a plain loop of autograd in float64, and steps of DP-SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from legolm.adapter import Tensors, init_factors
from legolm.adapter.merge import linears
from legolm.block import Coverage
from legolm.config import DpConfig, TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.finetune import Task, fit, lora
from legolm.finetune.loop import _backward_apart
from legolm.finetune.per_example import Private
from legolm.models import Head, lean, load_model, shape_of

EXAMPLES = [Tokens((10, 20 + i, *range(30, 33 + 3 * (i % 4)), 1), 2) for i in range(6)]
SCALE = 2.0


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Any:
    return load_model(tiny("llama"))


def coverage_of(model: Any, masked: bool) -> Coverage:
    """All of the model; masked: two thirds of one module's weights, the others whole."""
    shape = shape_of(model.config)
    whole = Coverage.full(shape)
    if not masked:
        return whole
    rows, columns = shape.matrix("mlp.up_proj")
    mask = (torch.arange(rows * columns).view(rows, columns) % 3) > 0
    return Coverage(shape, whole.layers, whole.groups, whole.neurons, {"layers.1.mlp.up_proj": mask})


def factors_of(coverage: Coverage) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    start = init_factors(coverage.shape, None, 4, seed=1)
    return {key: 0.1 * torch.randn(one.shape, generator=generator) for key, one in start.items()}


def by_loop(model: Any, coverage: Coverage, start: Tensors, example: Tokens) -> Tensors:
    """∂ mean answer loss of one example by each factor, with transformers' own forward pass in float64."""
    double = copy.deepcopy(model).double()
    names = {id(module): name for name, module in double.named_modules()}
    factors = {key: one.double().requires_grad_() for key, one in start.items()}
    weights = {}
    for layer, module, linear in linears(double, coverage, start):
        a, b = (factors[f"layers.{layer}.{module}.{side}"] for side in "AB")
        mask = coverage.mask(layer, module)
        merged = linear.weight.detach() + SCALE * b @ a
        weights[f"{names[id(linear)]}.weight"] = merged if mask is None else merged * mask
    ids = torch.tensor([example.ids])
    logits = functional_call(double, weights, (ids,)).logits[0, example.answer - 1 : -1]
    loss = cross_entropy(logits.double(), ids[0, example.answer :])
    return dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True))


@pytest.mark.parametrize(("masked", "size", "checkpointing"), [(False, 1000, False), (True, 17, True)])
def test_clipped_sums_are_those_of_a_plain_loop(masked: bool, size: int, checkpointing: bool, model: Any) -> None:
    """Some examples are clipped and some are not; frozen sides are in no norm."""
    coverage = coverage_of(model, masked)
    start = factors_of(coverage)
    frozen = {key for key in start if key.endswith("down_proj.A") or key.endswith("q_proj.B")}
    wanted = [by_loop(model, coverage, start, example) for example in EXAMPLES]
    trained = [key for key in sorted(start) if key not in frozen]
    norms = [float(torch.cat([one[key].flatten() for key in trained]).norm()) for one in wanted]
    bound = sorted(norms)[3]
    with lora(model, coverage, start, SCALE, frozen=frozen) as parameters, lean(model, "fp32", checkpointing):
        factors = list(parameters.values())
        _backward_apart(model, Head.of(model, "fp32"), EXAMPLES, factors, bound, size)
        found = {key: one.grad.clone() for key, one in parameters.items() if one.grad is not None}
    assert sorted(found) == trained
    for key in trained:
        expected = sum(one[key] * min(1, bound / norm) for one, norm in zip(wanted, norms, strict=True))
        torch.testing.assert_close(found[key].double(), expected, rtol=2e-3, atol=2e-5 * float(expected.abs().max()))


def step(model: Any, steps: int = 2, **dp: Any) -> tuple[Tensors, dict[str, float]]:
    config = TrainConfig(batch_size=3, learning_rate=0.01)
    coverage = Coverage.full(shape_of(model.config))
    start = init_factors(coverage.shape, None, 4, seed=1)
    given = DpConfig(level="example", **dp)
    return fit(Task(model, coverage, start, SCALE, EXAMPLES, config, "fp32", steps, 3, dp=given))


def test_a_training_says_its_rate_and_noise_and_is_another_each_time(model: Any) -> None:
    one, metrics = step(model, noise_multiplier=1.0)
    assert metrics["sampling_rate"] == 0.5
    assert metrics["noise_multiplier"] == 1.0
    assert metrics["steps"] == 2
    other, _ = step(model, noise_multiplier=1.0)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_with_next_to_no_noise_it_learns(model: Any) -> None:
    # Batches are drawn by chance that nobody can repeat, and one of a single example may be a hard one.
    found = [step(model, 60, noise_multiplier=1e-6, clip=10.0)[1] for _ in range(5)]
    assert median(one["loss_last"] / one["loss_first"] for one in found) < 0.96


def test_batches_are_poisson_samples_and_a_step_is_over_their_expected_size() -> None:
    private = Private.of(DpConfig(level="example", noise_multiplier=2.0, clip=0.5), 400, TrainConfig(batch_size=40), 5)
    batches = [next(private.batches()) for _ in range(200)]
    sizes = torch.tensor([float(len(one)) for one in batches])
    assert abs(float(sizes.mean()) - 40) < 5 * (36 / 200) ** 0.5
    assert abs(float(sizes.var()) / 36 - 1) < 0.6
    assert len({tuple(one) for one in batches}) == 200
    everyone = Private.of(DpConfig(level="example", noise_multiplier=1.0), 3, TrainConfig(batch_size=40), 5)
    assert next(everyone.batches()) == [0, 1, 2]
    factor = torch.nn.Parameter(torch.zeros(300, 300))
    private.disturb([factor])  # an empty batch
    assert factor.grad is not None
    assert float(factor.grad.std()) == pytest.approx(2.0 * 0.5 / 40, rel=0.03)


def test_a_round_that_alone_would_pass_the_budget_is_refused_where_it_trains() -> None:
    config, both = TrainConfig(batch_size=4), DpConfig(level="example", epsilon=1.0, noise_multiplier=0.3)
    assert Private.of(both, 50, config, 40).multiplier == 0.3
    with pytest.raises(LegolmError, match=r"epsilon 1: 8 steps of 50 examples with noise_multiplier 0\.3 cost 5\d"):
        Private.of(both, 50, config, 40, 8)
    with pytest.raises(LegolmError, match=r"privacy.dp.delta 0\.02: may show one of 50 examples whole"):
        Private.of(both.model_copy(update={"delta": 0.02}), 50, config, 40)
    enough = both.model_copy(update={"noise_multiplier": 30.0})
    assert Private.of(enough, 50, config, 40, 8).multiplier == 30.0
