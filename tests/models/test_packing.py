"""Packed sequences: the same as one by one, no leak, and losses and operations against plain references."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div, rms_norm
from transformers import AutoModelForCausalLM

from legolm.data import Tokens
from legolm.evaluation.answers import score_each
from legolm.finetune import Joint, LoraLinear
from legolm.models import (
    Head,
    answer_losses,
    decoder_layers,
    divergences,
    hidden_states,
    lean,
    load_model,
    pack,
    packing,
    shared_prompt,
)
from legolm.models.norm import RmsNorm

CPU = torch.device("cpu")


def some(*lengths: int) -> list[Tokens]:
    return [Tokens(tuple((7 * i + 3 * n) % 250 + 1 for i in range(n)), n - 2) for n in lengths]


def logits_of(model: Any, examples: list[Tokens]) -> list[torch.Tensor]:
    """Logits of each example from one packed pass."""
    with lean(model, "fp32"):
        packed = pack(examples, CPU)
        logits = Head.of(model, "fp32").logits(hidden_states(model, packed))
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    return [part for _, part in sorted(zip(order, logits.split(packed.lengths), strict=True), key=lambda pair: pair[0])]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt-350m"])
@pytest.mark.parametrize("long", [512, 4], ids=["own", "fused"])
def test_packed_is_one_by_one(
    family: str, long: int, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LONG", long)
    model = load_model(tiny(family))
    if family == "mistral":
        model.config.sliding_window = 5
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 5
    examples = some(9, 12, 12, 3, 11, 4)
    for example, found in zip(examples, logits_of(model, examples), strict=True):
        alone = model(torch.tensor(example.ids)[None]).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("similar", [0.8, 0.25])
def test_the_fused_attention_of_a_gpu_is_the_cpus(
    window: int | None, similar: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packing.SIMILAR, "cpu", similar)
    examples = some(9, 12, 12, 3, 11, 4)
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randn(heads, 51, 8, generator=draw, dtype=torch.float64) for heads in (6, 2, 2)]
    wanted = torch.randn(6, 51, 8, generator=draw, dtype=torch.float64)
    found = []
    for attention in (packing._PackedAttention.apply, packing._fused_attention):
        given_sides = [side.clone().requires_grad_() for side in sides]
        out = attention(*given_sides, pack(examples, CPU), 0.3, window)
        out.backward(wanted)
        found.append([out, *(side.grad for side in given_sides)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("attention", [packing._PackedAttention.apply, packing._fused_attention])
def test_what_all_begin_with_gets_the_gradient_of_all(window: int | None, attention: Any) -> None:
    """Once in the pack, or in each example: the same output, and of what is shared the sum of all gradients."""
    examples = some(9, 12, 12, 3, 11, 4, 10)
    apart, once = pack(examples, CPU), pack(examples, CPU, shared=2)
    places = torch.tensor([place for place, at in enumerate(apart.positions[0].tolist()) if at >= 2 or place < 2])
    assert len(places) == once.ids.shape[1] == 61 - 6 * 2
    first = torch.tensor([at if at < 2 else -1 for at in apart.positions[0].tolist()])
    spread = torch.where(first < 0, torch.searchsorted(places, torch.arange(61)), first)  # each token's place in `once`
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randn(heads, 49, 8, generator=draw, dtype=torch.float64) for heads in (6, 2, 2)]
    wanted = torch.randn(6, 49, 8, generator=draw, dtype=torch.float64)
    found = []
    for packed, order in ((once, torch.arange(49)), (apart, spread)):
        given_sides = [side.clone().requires_grad_() for side in sides]
        out = attention(*(side[:, order] for side in given_sides), packed, 0.3, window)
        out = out if packed is once else out[:, places]
        out.backward(wanted)
        found.append([out, *(side.grad for side in given_sides)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


LONG_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 128}
SCALED: dict[str, dict[str, Any]] = {
    "phi3": {
        "original_max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONG_FACTORS},
    },
    "llama": {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


@pytest.mark.parametrize("family", SCALED)
def test_packed_is_one_by_one_where_frequencies_follow_the_length(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against transformers' own model, loaded anew for each example: its dynamic NTK remembers longer ones."""
    folder = shutil.copytree(tiny(family), tmp_path / family)
    config = json.loads((folder / "config.json").read_text()) | SCALED[family]
    (folder / "config.json").write_text(json.dumps(config))
    examples, model = some(200, 77, 150), load_model(folder)
    with torch.no_grad():
        for _ in range(2):  # what ran before changes nothing
            for example, found in zip(examples, logits_of(model, examples), strict=True):
                alone: Any = AutoModelForCausalLM.from_pretrained(folder)
                torch.testing.assert_close(
                    found, alone(torch.tensor(example.ids)[None]).logits[0], rtol=1e-4, atol=1e-5
                )
        together = score_each(model, examples, 3, "fp32").losses
        assert together == pytest.approx([score_each(model, [one], 1, "fp32").losses[0] for one in examples], rel=1e-5)


def test_gradients_are_those_of_one_by_one(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("qwen3"))
    examples = some(9, 12, 8, 3)
    weight = model.model.embed_tokens.weight.requires_grad_()
    with lean(model, "fp32"):
        packed = pack(examples, CPU)
        states = hidden_states(model, packed)[packed.predict]
        answer_losses(states, Head.of(model, "fp32"), packed.labels).sum().backward()
    found = weight.grad.clone()
    weight.grad = None
    tied = weight.detach().clone()  # the head is frozen above
    for example in examples:
        ids = torch.tensor(example.ids)
        states = model.model(ids[None]).last_hidden_state[0, example.answer - 1 : -1]
        cross_entropy(states @ tied.T, ids[example.answer :], reduction="sum").backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt_neox", "opt-350m"])
def test_a_shared_prompt_has_the_gradients_of_one_by_one(family: str, tiny: Callable[[str], Path]) -> None:
    """Softcapped attention (gemma2) reads it in each example."""
    model = load_model(tiny(family))
    begin = (5, 6, 7, 8)
    examples = [Tokens((*begin, *row.ids), row.answer + 4) for row in some(9, 3, 8, 8)]
    assert shared_prompt(model, examples) == (0 if family == "gemma2" else 4)
    found = []
    for batches in ([examples], [[example] for example in examples]):
        factor = torch.zeros(8, model.config.hidden_size, requires_grad=True)
        with lean(model, "fp32"):
            for batch in batches:
                handle = decoder_layers(model)[0].register_forward_pre_hook(
                    lambda _module, given, factor=factor: (given[0] + 0.1 * given[0] @ (factor.T @ factor), *given[1:])
                )
                factor.data.copy_(torch.linspace(-1, 1, factor.numel()).view_as(factor))
                packed = pack(batch, CPU, shared_prompt(model, batch))
                states = hidden_states(model, packed)[packed.predict]
                answer_losses(states, Head.of(model, "fp32"), packed.labels).sum().backward()
                handle.remove()
        found.append(factor.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_nothing_leaks_between_examples(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"))
    first, second, third = some(12, 11, 5)
    changed = Tokens(tuple((one + 100) % 250 for one in second.ids), second.answer)
    before, after = logits_of(model, [first, second, third]), logits_of(model, [first, changed, third])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_afterwards_the_model_is_as_it_was(tiny: Callable[[str], Path]) -> None:
    model, text = load_model(tiny("qwen3")), torch.arange(1, 21)[None]
    before = model(text).logits
    with lean(model, "bf16", checkpointing=True):
        pass
    assert torch.equal(model(text).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_norm_that_changed_since_multiplies_by_what_it_is(family: str, tiny: Callable[[str], Path]) -> None:
    model, (example,) = load_model(tiny(family)), some(9)
    logits_of(model, [example])
    model.model.norm.weight.data.mul_(2).add_(0.5)  # which torch does not count as a new version
    (found,) = logits_of(model, [example])
    wanted = model(torch.tensor(example.ids)[None]).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_buckets_by_hand() -> None:
    found = pack(some(3, 10, 9, 3, 8), CPU).buckets
    # 10, 9 and 8 are at least 0.8 of 10; the two of 3 are equally long and need no padding.
    assert [(b.start, b.stop, b.count, b.length) for b in found] == [(0, 27, 3, 10), (27, 33, 2, 3)]
    assert (~found[0].own).nonzero().tolist() == [[1, 9], [2, 8], [2, 9]]
    assert found[0].rows.tolist()[1:] == [[*range(10, 19), 18], [*range(19, 27), 26, 26]]
    assert found[1].rows.tolist() == [[27, 28, 29], [30, 31, 32]] and found[1].own.all()


@settings(max_examples=30)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=8), st.integers(1, 2))
def test_putting_what_was_taken_gives_the_pack_back(lengths: list[int], groups: int) -> None:
    packed = pack(some(*lengths), CPU)
    values = torch.randn(2 * groups, sum(lengths), 3)
    back = torch.full_like(values.transpose(0, 1), torch.nan).contiguous().transpose(0, 1)
    for bucket in packed.buckets:
        taken = bucket.take(values, groups)
        assert taken.shape == (bucket.count * groups, 2 * bucket.length, 3)
        bucket.put(taken, back)
        assert bucket.take(values, groups, blank=True).count_nonzero() == 2 * groups * (bucket.stop - bucket.start) * 3
    assert torch.equal(values, back)
    assert packed.labels.tolist() == [packed.ids[0, place + 1] for place in packed.predict.tolist()]


def joint_of(weight: torch.Tensor, rank: int) -> Joint:
    return Joint([weight], [rank], weight.dtype)


def test_a_young_adapter_is_not_rounded_away() -> None:
    """x Wᵀ is about 1/4, where bfloat16's last place is 1/512; the adapter's term of a quarter of it must move some."""
    torch.manual_seed(0)
    x, weight = torch.rand(64, 256), torch.rand(512, 256) / 256
    a, b = torch.ones(1, 256) / 128, torch.full((512, 1), 1 / 2048)
    y = [
        LoraLinear.apply(x.bfloat16(), joint_of(weight.bfloat16(), 1), None, 1.0, 0.0, a, scale * b)[0].float()
        for scale in (0, 1)
    ]
    moved = float((y[1] - y[0]).mean())
    assert moved == pytest.approx(float((x @ a.T @ b.T).mean()), rel=0.1)


@pytest.mark.parametrize("sizes", [((4, 3),), ((4, 3), (2, 1), (5, 2))])
def test_lora_linear_against_autograd_in_float64(sizes: tuple[tuple[int, int], ...]) -> None:
    """Layers of these outputs and ranks that read the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(rows, 6, dtype=torch.float64) for rows, _ in sizes]
    biases = [torch.randn(rows, dtype=torch.float64) for rows, _ in sizes]
    shapes = [*((rank, 6) for _, rank in sizes), *sizes]
    factors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    joint = Joint(weights, [rank for _, rank in sizes], torch.float64)
    ys = LoraLinear.apply(x, joint, torch.cat(biases), 1.5, 0.0, *factors)
    pairs = zip(weights, biases, factors[: len(sizes)], factors[len(sizes) :], strict=True)
    expected = [x @ (weight + 1.5 * b @ a).T + bias for weight, bias, a, b in pairs]
    torch.testing.assert_close(list(ys), expected)
    loss, exact = (sum(place * y.square().sum() for place, y in enumerate(some, 1)) for some in (ys, expected))
    wanted = torch.autograd.grad(exact, (x, *factors))
    for found, one in zip(torch.autograd.grad(loss, (x, *factors)), wanted, strict=True):
        torch.testing.assert_close(found.double(), one, rtol=1e-5, atol=1e-5)


def test_lora_dropout_is_on_the_adapters_input_only() -> None:
    x, a, b = torch.ones(1, 1000, 1).requires_grad_(), torch.ones(1, 1), torch.ones(1, 1)
    torch.manual_seed(0)
    (y,) = LoraLinear.apply(x, joint_of(torch.zeros(1, 1), 1), None, 1.0, 0.25, a, b)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_rms_norm_against_torch() -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(3, 7, 16, requires_grad=True), torch.randn(16)
    y, expected = RmsNorm.apply(x, gain, 1e-5, torch.float32), rms_norm(x, (16,), gain, 1e-5)
    torch.testing.assert_close(y, expected)
    (wanted,) = torch.autograd.grad(expected.pow(3).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), x)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_losses_against_torch(softcap: float | None) -> None:
    torch.manual_seed(0)
    count = 300  # more than two chunks
    hidden, other = torch.randn(count, 8, requires_grad=True), torch.randn(count, 8)
    head = Head(torch.randn(50, 8), torch.randn(50), 0.5, softcap)
    labels = torch.randint(50, (count,))

    def plain(states: torch.Tensor) -> torch.Tensor:
        logits = 0.5 * (states @ head.weight.T + head.bias)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    target = plain(other).log_softmax(-1)
    pairs = (
        (answer_losses(hidden, head, labels), cross_entropy(plain(hidden), labels, reduction="none")),
        (
            divergences(hidden, head, other, head),
            kl_div(plain(hidden).log_softmax(-1), target, reduction="none", log_target=True).sum(-1),
        ),
    )
    by = torch.rand(count)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        (wanted,) = torch.autograd.grad(expected @ by, hidden)
        torch.testing.assert_close(torch.autograd.grad(found @ by, hidden)[0], wanted, rtol=1e-3, atol=1e-4)
