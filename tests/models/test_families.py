"""Every family of the table, on tiny random models: bias, fused matrices, QK-norm, post norms, sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from legolm.adapter import Tensors, factor_key, factor_shape, init_factors, merged, modules_of, slice_factors
from legolm.block import Block, Coverage, slice_matrix
from legolm.config import BlockConfig, CalibrationConfig
from legolm.errors import LegolmError
from legolm.finetune import lora
from legolm.models import (
    FAMILIES,
    LayeredModel,
    Shape,
    decoder_layers,
    fingerprint,
    load_config,
    load_model,
    narrow,
    shape_of,
)
from legolm.prune import calibrate, cut_blocks
from legolm.prune.calibrate import Stream
from legolm.prune.moments import Regression
from legolm.prune.select import refit
from legolm.system import Progress

TOKENS = torch.arange(2, 202).view(5, 40)
SHAPES: dict[str, dict[str, Any]] = {
    "neurons": {"intermediate_size": 40},
    "heads": {"num_key_value_heads": 1},
    "all": {"intermediate_size": 40, "num_key_value_heads": 1, "num_hidden_layers": 1},
}


@pytest.fixture(scope="module")
def cut(tiny: Callable[[str], Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Block]:
    """A block of a variant, made once. Where KV groups are fixed, they are left out of the target."""
    made: dict[str, Block] = {}

    def make(variant: str, **target: Any) -> Block:
        if variant in ("olmo2", "gpt_neox"):
            target.pop("num_key_value_heads", None)
            if not target:
                pytest.skip("its KV groups are fixed")
        spec = BlockConfig(
            name="b",
            calibration=CalibrationConfig(text=str(corpus), samples=8, length=64),
            **{"method": "structured"} | target,
        )
        key = variant + repr(sorted(target.items()))
        if key not in made:
            base = tiny(variant)
            out = tmp_path_factory.mktemp("cut") / "block"
            (made[key],) = cut_blocks(base, fingerprint(base), [(spec, out)], 0, "fp32", Progress())
        return made[key]

    return make


def stream_of(path: Path) -> Stream:
    return Stream.start(LayeredModel(path), TOKENS, "fp32")


def linear(model: Any, layer: int, module: str) -> nn.Linear:
    found = decoder_layers(model)[layer].get_submodule(module)
    assert isinstance(found, nn.Linear)
    return found


def kept(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def end_of(stream: Stream, layer: nn.Module, name: str) -> Regression:
    """How the matrix that ends the MLP should answer for the first layer to give what it gives; nothing is cut."""
    after, fits = stream.fork(), list[Regression]()
    after.advance(0, layer)
    stream.end(0, layer, name, after.hidden, fits.append)
    return fits[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole matrix: how far single entries are off depends on how the processor rounds."""
    return float((found - expected).norm() / expected.norm())


def test_the_table_has_every_linear_layer_and_its_size(variant: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(variant))
    shape = shape_of(model.config)
    layer = decoder_layers(model)[0]
    assert {name for name, part in layer.named_modules() if isinstance(part, nn.Linear)} == set(shape.modules)
    for name in shape.modules:
        assert tuple(linear(model, 0, name).weight.shape) == shape.matrix(name)


def test_layer_by_layer_equals_the_whole_model(variant: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(variant))
    outputs: list[Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        model(TOKENS)
    whole = list(outputs)
    stream = stream_of(tiny(variant))
    for index, layer in enumerate(decoder_layers(model)):
        stream.advance(index, layer)
        torch.testing.assert_close(stream.hidden, whole[index])


@pytest.mark.parametrize("unit", ["query", "neuron"])
def test_fitting_to_what_the_layer_gives_changes_nothing(variant: str, unit: Any, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(variant))
    layer, name = decoder_layers(model)[0], shape_of(model.config).reader(unit)
    stream = stream_of(tiny(variant))
    fit = stream.regression(0, layer, name) if unit == "query" else end_of(stream, layer, name)
    weight = linear(model, 0, name).weight
    assert relative_error(refit(fit, weight, None), weight) < 1e-2


def test_after_a_cut_the_stream_is_where_the_cut_layer_brings_it(variant: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(variant))
    shape, layer = shape_of(model.config), decoder_layers(model)[0]
    name = shape.reader("neuron")
    stream = stream_of(tiny(variant))
    again, before = stream.fork(), stream.fork()
    stays = tuple(range(0, shape.neurons, 2))
    half = Coverage(shape, (0,), (tuple(range(shape.kv_groups)),), (stays,))

    def halve(_fit: Regression) -> Tensor | None:
        for one, module in shape.modules.items():
            if "neuron" in (*module.rows, module.cols):
                cut = layer.get_submodule(one)
                assert isinstance(cut, nn.Linear)
                narrow(cut, slice_matrix(half, 0, one, cut.weight.data), half.rows(0, one))
        return half.cols(0, name)

    before.advance(0, layer)
    stream.end(0, layer, name, None, halve)
    again.advance(0, layer)
    torch.testing.assert_close(stream.hidden, again.hidden)
    assert not torch.allclose(stream.hidden, before.hidden)


def test_in_chunks_the_fit_and_what_follows_are_the_same(
    variant: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = decoder_layers(load_model(tiny(variant)))[0]
    name = shape_of(load_config(tiny(variant))).reader("neuron")
    whole = stream_of(tiny(variant))
    monkeypatch.setattr(calibrate, "WHOLE_SHARE", 2**60)
    chunks = stream_of(tiny(variant))
    first, second = end_of(whole, layer, name), end_of(chunks, layer, name)
    torch.testing.assert_close(first.moments.sum, second.moments.sum, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.cross, second.cross, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.hidden, chunks.hidden)


@pytest.mark.parametrize(("variant", "nothing"), [("gemma3_text", -1.0), ("olmo2", 0.0)])
def test_a_norm_that_lets_nothing_of_a_channel_through(
    variant: str, nothing: float, tiny: Callable[[str], Path]
) -> None:
    model = load_model(tiny(variant))
    layer = decoder_layers(model)[0]
    layer.get_submodule("post_feedforward_layernorm").weight.data[3] = nothing
    weight = linear(model, 0, "mlp.down_proj").weight
    fitted = refit(end_of(stream_of(tiny(variant)), layer, "mlp.down_proj"), weight, None)
    assert relative_error(fitted, weight) < 1e-2


@pytest.mark.parametrize("target", SHAPES.values(), ids=SHAPES)
def test_structured_blocks_load_plainly_and_keep_the_llms_rows(
    variant: str, target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    block = cut(variant, **target)
    model, dense = AutoModelForCausalLM.from_pretrained(block.path), load_model(tiny(variant))
    shape = block.coverage.shape
    assert len(decoder_layers(model)) == len(block.coverage.layers)
    assert block.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.tie_word_embeddings == dense.config.tie_word_embeddings
    for j, layer in enumerate(block.coverage.layers):
        for name, module in shape.modules.items():
            small, whole = linear(model, j, name), linear(dense, layer, name)
            rows = block.coverage.rows(layer, name)
            assert tuple(small.weight.shape) == block.coverage.matrix(layer, name)
            if module.rows != ("hidden",):  # the others are fitted anew
                assert torch.equal(small.weight, kept(whole.weight, rows))
            if whole.bias is not None:
                assert torch.equal(small.bias, kept(whole.bias, rows))
    if getattr(dense.config, "layer_types", None) is not None:
        assert model.config.layer_types == [dense.config.layer_types[i] for i in block.coverage.layers]


WINDOW = {"method": "window", "intermediate_size": 40, "num_key_value_heads": 1, "offset": 1}


@pytest.mark.parametrize("target", [SHAPES["neurons"], SHAPES["heads"], WINDOW], ids=["neurons", "heads", "window"])
def test_a_block_computes_what_the_llm_does_with_the_cut_columns_at_zero(
    variant: str, target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    """A wrong row of a fused matrix, a head in the wrong group or a lost bias shows here."""
    block = cut(variant, **target)
    model, dense = load_model(block.path), load_model(tiny(variant))
    for layer in block.coverage.layers:
        for unit in ("query", "neuron"):
            name = block.coverage.shape.reader(unit)
            cols, small = block.coverage.cols(layer, name), linear(model, layer, name).weight
            whole = linear(dense, layer, name).weight.data
            whole.zero_()
            whole[:, slice(None) if cols is None else cols] = small
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "target",
    [{"method": "sparsegpt", "sparsity": 0.5}, {"method": "wanda", "pattern": "2:4"}],
    ids=["sparsegpt", "2:4"],
)
def test_unstructured_blocks_are_zero_where_the_mask_says(
    variant: str, target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    block = cut(variant, **target)
    model = AutoModelForCausalLM.from_pretrained(block.path)
    for layer in block.coverage.layers:
        for name in block.coverage.shape.modules:
            mask = block.coverage.mask(layer, name)
            assert torch.equal(linear(model, layer, name).weight != 0, mask)
    assert block.sparsity == pytest.approx(0.5, abs=0.01)


def factors_for(coverage: Coverage) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    start = slice_factors(coverage, init_factors(coverage.shape, None, 3, seed=1), 3)
    return {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in start.items()}


@pytest.mark.parametrize(
    "target", [SHAPES["all"], {"method": "magnitude", "sparsity": 0.5}], ids=["structured", "masked"]
)
def test_an_adapter_fits_trains_and_merges(variant: str, target: dict, cut: Callable[..., Block]) -> None:
    block = cut(variant, **target)
    model, coverage = load_model(block.path), block.coverage
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = factors_for(coverage)
    with lora(model, coverage, factors, 2.0) as parameters:
        assert set(parameters) == set(factors)
        assert all(tuple(parameters[key].shape) == factor_shape(coverage, key, 3) for key in factors)
        trained = model(TOKENS).logits
        trained.square().mean().backward()
        assert all(bool(parameter.grad.abs().sum() > 0) for parameter in parameters.values())
    with merged(model, coverage, factors, 2.0):
        torch.testing.assert_close(model(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)
        for layer, name in ((layer, name) for layer in coverage.layers for name in coverage.shape.modules):
            mask = coverage.mask(layer, name)
            assert mask is None or bool((linear(model, layer, name).weight[~mask] == 0).all())
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_slice_of_an_adapter_is_the_slice_of_its_product(
    variant: str, cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    """Merged into the block, a global adapter moves each kept weight as it moves it in the LLM."""
    coverage = cut(variant, **SHAPES["all"]).coverage
    whole = factors_for(Coverage.full(coverage.shape))
    model = load_model(tiny(variant))
    with merged(model, Coverage.full(coverage.shape), whole, 2.0):
        in_llm = {key: linear(model, *key).weight.clone() for key in _all(coverage)}
    sliced = slice_factors(coverage, whole, 3)
    for layer, name in _all(coverage):
        a, b = sliced[factor_key(layer, name, "A")], sliced[factor_key(layer, name, "B")]
        moved = in_llm[layer, name] - linear(model, layer, name).weight
        rows, cols = coverage.rows(layer, name), coverage.cols(layer, name)
        torch.testing.assert_close(2.0 * b @ a, kept(kept(moved, rows).T, cols).T, rtol=1e-4, atol=1e-5)


def _all(coverage: Coverage) -> list[tuple[int, str]]:
    return [(layer, name) for layer in coverage.layers for name in coverage.shape.modules]


def test_rows_of_fused_matrices_by_hand() -> None:
    shape = Shape("phi3", layers=1, hidden=8, neurons=3, kv_groups=2, queries_per_group=2, head_dim=2)
    coverage = Coverage(shape, (0,), ((1,),), ((0, 2),))
    # Queries 0 to 7, keys 8 to 11, values 12 to 15; group 1 has heads 2 and 3. Then gates 0 to 2, ups 3 to 5.
    assert coverage.rows(0, "self_attn.qkv_proj").tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert coverage.rows(0, "mlp.gate_up_proj").tolist() == [0, 2, 3, 5]
    assert coverage.matrix(0, "mlp.gate_up_proj") == (4, 8)
    neox = Shape("gpt_neox", layers=1, hidden=4, neurons=3, kv_groups=2, queries_per_group=1, head_dim=2)
    # Query, key and value of one head side by side.
    assert Coverage(neox, (0,), ((1,),), ((0,),)).rows(0, "attention.query_key_value").tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("variant", ["olmo2", "gpt_neox"])
def test_kv_groups_that_cannot_be_cut(variant: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    spec = BlockConfig(name="b", method="structured", num_key_value_heads=1)
    with pytest.raises(LegolmError, match=rf"family '{variant}' keeps all \d, because its "):
        cut_blocks(tiny(variant), "f", [(spec, tmp_path / "block")], 0, "fp32", Progress())


def test_errors_name_what_the_family_has(tiny: Callable[[str], Path]) -> None:
    shape = shape_of(load_config(tiny("phi3")))
    with pytest.raises(LegolmError, match="'q_proj' is not a linear layer of family 'phi3'; known: qkv_proj, o_proj"):
        modules_of(shape, ["q_proj"])
    assert modules_of(shape, None) == list(FAMILIES["phi3"].modules)
    with pytest.raises(LegolmError, match="no such linear layer"):
        factor_shape(Coverage.full(shape), "layers.0.mlp.up_proj.A", 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llame"}, "family 'llame' is not known to this transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "legolm import MODEL --out DIR"),
        ({"text_config": object()}, "text-only checkpoint"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal LM"),
    ],
)
def test_models_that_are_not_for_us(changes: dict, says: str, tiny: Callable[[str], Path]) -> None:
    config = load_config(tiny("llama"))
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(LegolmError, match=says):
        shape_of(config)
