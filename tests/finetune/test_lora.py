"""LoRA on a block, the masked forward, merging and the training loop."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from legolm.adapter import Tensors, init_factors, merged, slice_factors
from legolm.block import Block, Coverage
from legolm.config import BlockConfig, TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.finetune import MaskedLinear, Task, fit, lora, whole
from legolm.models import LLAMA, decoder_layers, fingerprint, load_model, shape_of
from legolm.prune import cut_blocks
from legolm.system import Progress

MODULES = LLAMA.modules
TARGETS = [module.rpartition(".")[2] for module in MODULES]
TEXT = torch.arange(1, 41).view(2, 20)


def factors_for(coverage: Coverage, rank: int = 3) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    start = slice_factors(coverage, init_factors(coverage.shape, TARGETS, rank, seed=1), rank)
    return {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in start.items()}


@pytest.fixture
def sparse(tiny: Callable[[str], Path], tmp_path: Path) -> Block:
    base = tiny("llama")
    spec = BlockConfig(name="m", method="magnitude", sparsity=0.5)
    return cut_blocks(base, fingerprint(base), [(spec, tmp_path / "sparse")], 0, "fp32", Progress())[0]


def test_the_adapter_is_pefts(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"))
    coverage = Coverage.full(shape_of(model.config))
    factors = factors_for(coverage)
    reference = get_peft_model(load_model(tiny("llama")), PeftConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    state = {}
    for key, tensor in factors.items():
        path, side = key.rsplit(".", 1)
        state[f"base_model.model.model.{path}.lora_{side}.default.weight"] = tensor
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    with lora(model, coverage, factors, scale=2.0) as parameters:
        assert set(parameters) == set(factors)
        torch.testing.assert_close(model(TEXT).logits, reference(TEXT).logits)


def test_afterwards_the_model_is_as_it_was(sparse: Block) -> None:
    model = load_model(sparse.path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = factors_for(sparse.coverage)
    with lora(model, sparse.coverage, factors, 2.0):
        pass
    with merged(model, sparse.coverage, factors, 2.0):
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("masked", [False, True], ids=["structured", "masked"])
def test_what_is_trained_is_what_is_merged(masked: bool, sparse: Block, tiny: Callable[[str], Path]) -> None:
    model = load_model(sparse.path if masked else tiny("llama"))
    coverage = sparse.coverage if masked else Coverage.full(sparse.coverage.shape)
    factors = factors_for(coverage)
    with lora(model, coverage, factors, 2.0):
        trained = model(TEXT).logits
    with merged(model, coverage, factors, 2.0):
        torch.testing.assert_close(model(TEXT).logits, trained, rtol=1e-4, atol=1e-5)
        for key, mask in coverage.masks.items():
            layer, module = int(key.split(".")[1]), key.split(".", 2)[2]
            assert bool((model.model.layers[layer].get_submodule(module).weight[~mask] == 0).all())


def test_below_the_lowest_layer_that_trains_nothing_is_kept_for_backward(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"))
    coverage = Coverage.full(shape_of(model.config))
    factors = factors_for(coverage)
    outputs: list[torch.Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda layer, given, hidden: outputs.append(hidden))
    with lora(model, coverage, factors, 2.0, frozen=[key for key in factors if "layers.0." in key]) as parameters:
        model(TEXT).logits.square().mean().backward()
        assert [hidden.requires_grad for hidden in outputs] == [False, True]
        assert all("layers.1." in key and one.grad is not None for key, one in parameters.items())


def test_a_pass_that_failed_between_two_layers_keeps_nothing_from_the_next_one(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up are computed together; where memory ran out between them, a smaller pass is to have all of it."""
    model = load_model(tiny("llama"))
    coverage = Coverage.full(shape_of(model.config))
    last = decoder_layers(model)[-1].mlp
    seen: list[weakref.ref[torch.Tensor]] = []

    def fails(_gate: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    with lora(model, coverage, factors_for(coverage), 2.0):
        last.register_forward_pre_hook(lambda _layer, given: seen.append(weakref.ref(given[0])))
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="allocate"):
            patched.setattr(last.act_fn, "forward", fails)
            model(TEXT)
        alive: list[object] = []
        decoder_layers(model)[0].register_forward_pre_hook(lambda *_: alive.append(seen[0]()))
        model(TEXT)
        assert len(seen) == 2 and alive == [None]


def test_layers_that_read_the_same_may_be_asked_alone_twice_and_of_another_input(tiny: Callable[[str], Path]) -> None:
    """q, k and v are computed together; no answer depends on that, and none is held when all were asked."""
    model = load_model(tiny("llama"))
    coverage = Coverage.full(shape_of(model.config))
    factors = factors_for(coverage)
    attention = decoder_layers(model)[0].self_attn
    x, other = (torch.randn(1, 5, model.config.hidden_size) for _ in range(2))

    def wanted(module: str, given: torch.Tensor) -> torch.Tensor:
        a, b = (factors[f"layers.0.self_attn.{module}.{side}"] for side in "AB")
        return given @ (attention.get_submodule(module).weight + 2.0 * b @ a).T

    with lora(model, coverage, factors, 2.0):
        for module, given in (("q_proj", x), ("k_proj", other), ("k_proj", x), ("k_proj", x), ("v_proj", x)):
            torch.testing.assert_close(attention.get_submodule(module)(given), wanted(module, given))
        for module in ("v_proj", "q_proj", "k_proj"):
            torch.testing.assert_close(attention.get_submodule(module)(other), wanted(module, other))
        held = weakref.ref(other)
        del other
        assert held() is None


def test_masked_gradients_against_autograd_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(s, generator=generator).requires_grad_() for s in ((2, 5, 6), (3, 6), (4, 3)))
    weight, mask = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) > 0.5
    MaskedLinear.apply(x, weight, None, a, b, mask, 1.5, 0).square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    (exact[0] @ (mask * (weight.double() + 1.5 * exact[2] @ exact[1])).T).square().sum().backward()
    for found, expected in zip((x, a, b), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


def examples() -> list[Tokens]:
    return [Tokens((10, 20 + i, 30, 40, 1), 2) for i in range(12)]


def train(model: object, coverage: Coverage, **settings: object) -> tuple[Tensors, dict[str, float]]:
    config = TrainConfig(batch_size=4, learning_rate=settings.pop("learning_rate", 0.01))
    start = slice_factors(coverage, init_factors(coverage.shape, TARGETS, 4, seed=1), 4)
    steps, seed, precision = settings.pop("steps", 30), settings.pop("seed", 0), settings.pop("precision", "fp32")
    return fit(Task(model, coverage, start, 2.0, examples(), config, precision, steps, seed))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_and_the_seed_decides_all(precision: str, sparse: Block) -> None:
    model = load_model(sparse.path)
    delta, metrics = train(model, sparse.coverage, precision=precision)
    # The random model's tied embeddings are short: its loss cannot fall far below log(260) - 1.3 = 4.3.
    assert metrics["loss_last"] < metrics["loss_first"] - 0.4
    assert metrics["tokens"] == 30 * 4 * 5
    again, _ = train(model, sparse.coverage, precision=precision)
    assert all(torch.equal(delta[key], again[key]) for key in delta)
    other, _ = train(model, sparse.coverage, precision=precision, seed=1)
    assert any(not torch.equal(delta[key], other[key]) for key in delta)
    assert all(tensor.dtype == torch.float32 for tensor in delta.values())


def test_a_loss_that_explodes_is_one_clear_error(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"))
    with pytest.raises(LegolmError, match=r"train\.learning_rate 1e\+30"):
        train(model, Coverage.full(shape_of(model.config)), learning_rate=1e30)


def test_whole_weights_train_under_the_mask_and_stay_in_the_model(sparse: Block) -> None:
    model = load_model(sparse.path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linear, mask = model.model.layers[0].mlp.up_proj, sparse.coverage.mask(0, "mlp.up_proj")
    with whole(model, sparse.coverage, "fp32") as parameters:
        torch.testing.assert_close(model(TEXT).logits, load_model(sparse.path)(TEXT).logits)
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        model(TEXT).logits.square().mean().backward()
        optimizer.step()
        assert torch.equal(linear.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert bool((linear.weight[~mask] == 0).all())
    moved = linear.weight[mask] - before["model.layers.0.mlp.up_proj.weight"][mask]
    torch.testing.assert_close(moved.abs().median(), torch.tensor(0.01), rtol=0.01, atol=0)  # Adam's first step
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize("fails", ["while it merges", "while it goes on", "while it goes"])
def test_afterwards_it_is_as_it_was_where_memory_ran_out(
    fails: str, sparse: Block, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("llama")
    model, left = load_model(base), [5]
    coverage = Coverage.full(shape_of(model.config))
    before, wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(TEXT).logits

    def short(of: Any, name: str, caller: str = "") -> None:
        real = getattr(of, name)

        def counted(*given: Any, **named: Any) -> Any:
            left[0] -= not caller or sys._getframe(1).f_code.co_name == caller
            if left[0] == 0:
                raise MemoryError
            return real(*given, **named)

        monkeypatch.setattr(of, name, counted)

    if fails == "while it merges":
        short(sys.modules["legolm.adapter.merge"], "merged_weight")
        with pytest.raises(MemoryError), merged(model, coverage, factors_for(coverage), 2.0):
            pass
    else:
        where = sys.modules[lora.__module__], "_Adapted"
        short(*((torch.Tensor, "contiguous", "lora") if fails == "while it goes" else where))
        with pytest.raises(MemoryError), lora(model, coverage, factors_for(coverage), 2.0):
            pass
    monkeypatch.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TEXT).logits, wanted)
