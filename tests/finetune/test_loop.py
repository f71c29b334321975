"""The training loop: what stops it, what it refuses, what changes nothing."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from legolm.adapter import Tensors, init_factors, slice_factors, tensors_hash
from legolm.block import Coverage
from legolm.config import TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.finetune import Task, fit, lora
from legolm.finetune.loop import Diverged, _backward, _micro_batches, _with_less_memory, learning_rate
from legolm.models import Head, lean, load_model, shape_of

EXAMPLES = [Tokens((10, 20 + i, *range(30, 33 + 3 * (i % 4)), 1), 2) for i in range(12)]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Any:
    return load_model(tiny("llama"))


def train(
    model: Any,
    steps: int = 6,
    examples: list[Tokens] = EXAMPLES,
    fit_with: dict | None = None,
    each: int | None = None,
    **settings: Any,
) -> tuple[Tensors, dict[str, float]]:
    """`each`: the steps of a round, if others than these."""
    config = TrainConfig(**{"steps": each or steps, "batch_size": 4, "learning_rate": 0.01} | settings)
    coverage = Coverage.full(shape_of(model.config))
    start = init_factors(coverage.shape, None, 4, seed=1)
    return fit(Task(model, coverage, start, 2.0, examples, config, "fp32", steps, 3, **(fit_with or {})))


def difference(one: Tensors, other: Tensors) -> float:
    """Largest difference of any factor's change, relative to the largest change."""
    return max(float((one[key] - other[key]).abs().max()) for key in one) / max(
        float(tensor.abs().max()) for tensor in one.values()
    )


@pytest.mark.parametrize("settings", [{"micro_batch_tokens": 9}, {"gradient_checkpointing": True}], ids=str)
def test_what_saves_memory_changes_nothing(settings: dict, model: Any) -> None:
    # SGD-like steps: Adam's first steps have size 1 whatever the gradient, and blow rounding up where it is near zero.
    plain, metrics = train(model, steps=1)
    other, again = train(model, steps=1, **settings)
    assert again["loss_first"] == pytest.approx(metrics["loss_first"], rel=1e-5)
    moved = {key: (plain[key] * other[key] >= 0).double().mean() for key in plain}
    assert min(moved.values()) > 0.99


@pytest.mark.parametrize("size", [1, 9, 17])
def test_the_gradient_of_a_split_batch_is_that_of_the_whole(size: int, model: Any) -> None:
    (whole, wanted), (split, found) = gradient(model, EXAMPLES[:5], 1000), gradient(model, EXAMPLES[:5], size)
    assert split == pytest.approx(whole, rel=1e-6)
    assert difference(found, wanted) < 1e-5


def test_what_all_prompts_of_a_batch_begin_with_is_read_once(model: Any) -> None:
    begin = range(100, 106)
    batch = [Tokens((*begin, *one.ids), one.answer + 6) for one in EXAMPLES[:5]]
    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, given, _out: read.append(given[0].numel())
    )
    (whole, found), (apart, wanted) = gradient(model, batch, 1000), gradient(model, batch, 1)
    handle.remove()
    rows = sum(len(one.ids) for one in batch)
    assert read[0] == rows - 4 * 7  # token 10, which all rows have, predicts nothing
    assert sum(read[1:]) == rows
    assert whole == pytest.approx(apart, rel=1e-6)
    assert difference(found, wanted) < 1e-5


def gradient(model: Any, batch: list[Tokens], size: int) -> tuple[float, Tensors]:
    """Mean loss of a batch and the gradient of each factor, in micro-batches of `size` tokens."""
    coverage = Coverage.full(shape_of(model.config))
    start = {key: 0.1 * torch.ones_like(one) for key, one in init_factors(coverage.shape, None, 4, seed=1).items()}
    with lora(model, coverage, start, 2.0) as parameters, lean(model, "fp32"):
        mean = _backward(model, Head.of(model, "fp32"), batch, size).mean
        found = {key: one.grad.clone() for key, one in parameters.items() if one.grad is not None}
    assert len(found) == len(start)
    return mean, found


def test_micro_batches_by_hand() -> None:
    # 24 tokens need two parts of at most 16, so about 12 each: 9 + 7, and what is left.
    assert _micro_batches([3, 9, 5, 7], 16) == [[1, 3], [2, 0]]
    assert _micro_batches([3, 9, 5, 7], 15) == [[1], [3, 2], [0]]
    assert _micro_batches([40, 2], 15) == [[0], [1]]
    assert _micro_batches([4, 4], 100) == [[0, 1]]


def test_frozen_factors_stay_and_are_left_out(model: Any) -> None:
    frozen = {key for key in init_factors(shape_of(model.config), None, 4, seed=1) if key.endswith(".A")}
    delta, metrics = train(model, steps=12, fit_with={"frozen": frozen})
    assert {key[-1] for key in delta} == {"B"}
    assert all(bool(tensor.any()) for tensor in delta.values())
    assert metrics["loss_last"] < metrics["loss_first"]


def test_the_proximal_term_holds_the_adapter_back(model: Any) -> None:
    def norm(mu: float) -> float:
        delta, _ = train(model, steps=30, fit_with={"proximal": mu})
        return math.sqrt(sum(float(tensor.square().sum()) for tensor in delta.values()))

    assert norm(100.0) < 0.5 * norm(0.0)


def test_dropout_follows_the_seed(model: Any) -> None:
    plain, _ = train(model, steps=2)
    dropped, _ = train(model, steps=2, fit_with={"dropout": 0.5})
    again, _ = train(model, steps=2, fit_with={"dropout": 0.5})
    assert all(torch.equal(dropped[key], again[key]) for key in dropped)
    assert difference(plain, dropped) > 0.01


def test_it_stops_at_the_first_limit(model: Any) -> None:
    assert train(model, steps=5)[1]["steps"] == 5
    assert train(model, steps=50, epochs=1.5)[1]["steps"] == math.ceil(1.5 * 12 / 4)
    lengths = [len(example.ids) for example in EXAMPLES]
    assert train(model, steps=50, tokens=sum(lengths))[1]["steps"] == 3  # one epoch has them all
    assert train(model, steps=50, seconds=1e-9)[1]["steps"] == 1


def test_each_of_several_trainings_in_one_has_its_own_limits(model: Any) -> None:
    parts = {"parts": [20, 20, 2]}
    assert train(model, steps=42, fit_with=parts)[1]["steps"] == 42
    assert train(model, steps=42, fit_with=parts, epochs=1.5)[1]["steps"] == 5 + 5 + 2
    assert train(model, steps=42, fit_with=parts, tokens=1)[1]["steps"] == 3
    assert train(model, steps=42, fit_with=parts, seconds=1e-9)[1]["steps"] == 3


@pytest.mark.parametrize("limit", [{"epochs": 1.0}, {"tokens": 126}], ids=str)
def test_the_schedule_ends_with_what_limits_leave_of_the_steps(limit: dict, model: Any) -> None:
    # 12 examples of 126 tokens in all, four a step: three steps of a training, whatever its hundred.
    for done in (0, 1):
        wanted, _ = train(model, steps=3, fit_with={"done": 3 * done, "total": 6})
        found, metrics = train(model, steps=100, fit_with={"done": 100 * done, "total": 200}, **limit)
        assert metrics["steps"] == 3
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    # Two own steps behind two such trainings: at the end of their way, not of that of 200 steps.
    wanted, _ = train(model, steps=2, fit_with={"done": 6, "total": 8})
    found, _ = train(model, steps=2, fit_with={"done": 200, "total": 202}, each=100, **limit)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_a_narrow_block_learns_at_a_higher_rate_in_its_mlp(model: Any) -> None:
    # Adam's first step is the rate, whatever the gradient: by hand 0.01, and twice that with half of the neurons.
    whole = Coverage.full(shape_of(model.config))
    half = replace(whole, neurons=tuple(one[::2] for one in whole.neurons))
    with torch.random.fork_rng():
        narrow = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_half(model)))
    start = slice_factors(half, init_factors(half.shape, None, 4, seed=1), 4)
    task = Task(narrow, half, start, 2.0, EXAMPLES, TrainConfig(learning_rate=0.01), "fp32", 1, 3)
    plain, wide = fit(task)[0], fit(task, by_width=True)[0]
    for key, moved in wide.items():
        step = 0.02 if "mlp." in key else 0.01
        assert float(moved.abs().max()) == pytest.approx(step if moved.any() else 0, rel=1e-2), key
        assert float(plain[key].abs().max()) == pytest.approx(0.01 if moved.any() else 0, rel=1e-2), key
    dense = Task(model, whole, init_factors(whole.shape, None, 4, seed=1), 2.0, EXAMPLES, task.config, "fp32", 3, 3)
    assert tensors_hash(fit(dense)[0]) == tensors_hash(fit(dense, by_width=True)[0])


def _half(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict() | {"intermediate_size": model.config.intermediate_size // 2}
    del found["model_type"]
    return found


def test_learning_rates_by_hand() -> None:
    constant = learning_rate(TrainConfig(), 8)
    assert [constant(step) for step in range(9)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    cosine = learning_rate(TrainConfig(schedule="cosine", warmup_steps=2), 4)
    assert [cosine(step) for step in range(5)] == pytest.approx([0.5, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])


def test_a_loss_that_explodes_names_step_and_example_and_keeps_the_last_good_state(model: Any) -> None:
    with pytest.raises(
        Diverged, match=r"train\.learning_rate 1e\+30: .* not finite at step 2 \(examples \d+, "
    ) as found:
        train(model, learning_rate=1e30)
    assert found.value.metrics["steps"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in found.value.delta.values())


def test_an_example_without_an_answer_is_named(model: Any) -> None:
    with pytest.raises(LegolmError, match="example 1 has no prompt or no answer"):
        train(model, examples=[EXAMPLES[0], Tokens((1, 2, 3), 3)])


def test_truncated_examples_are_counted(model: Any) -> None:
    cut = [Tokens(example.ids, example.answer, truncated=i < 5) for i, example in enumerate(EXAMPLES)]
    assert train(model, steps=3, examples=cut)[1]["truncated"] == 5


def test_out_of_memory_halves_the_micro_batch() -> None:
    tried: list[int] = []

    def backward(size: int) -> str:
        tried.append(size)
        torch.empty(1 << 60 if size > 30 else 1, dtype=torch.uint8)
        return "done"

    with pytest.warns(UserWarning, match="out of memory; going on with micro-batches of 25 tokens"):
        assert _with_less_memory(backward, 100, []) == ("done", 25)
    assert tried == [100, 50, 25]
    with pytest.raises(LegolmError, match="not even one example fits"), pytest.warns(UserWarning):
        _with_less_memory(lambda size: torch.empty(1 << 60), 2, [])
    with pytest.raises(RuntimeError, match="shapes cannot"):
        _with_less_memory(lambda size: torch.ones(2, 3) @ torch.ones(2, 3), 2, [])


def test_a_model_goes_with_its_last_user(variant: str, tiny: Callable[[str], Path]) -> None:
    """For a client looks for no garbage when it changes models."""
    model = load_model(tiny(variant))
    gradient(model, [Tokens((3, 5, 7, 9), 2)] * 4, 8)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
