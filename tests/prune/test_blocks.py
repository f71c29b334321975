"""Cut blocks on disk: what `from_pretrained` loads, what the manifest says, what goes wrong clearly."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import legolm
from legolm.block import Base, Block, read_block
from legolm.config import BlockConfig, CalibrationConfig, Precision, RecoverConfig
from legolm.errors import LegolmError
from legolm.models import LLAMA, LayeredModel, fingerprint, load_config, load_model, load_tokenizer, shape_of
from legolm.prune import cut_blocks, kept_block, planned_coverage, recipe_of
from legolm.prune.calibrate import Stream
from legolm.prune.moments import Regression
from legolm.prune.select import refit
from legolm.prune.target import given_shape, shapes_within
from legolm.system import Progress

NAMES = ("llama",)  # the others: tests/models/test_families.py
LINEARS = {
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.25},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "2:4": {"method": "wanda", "pattern": "2:4"},
}
SHAPES = {
    "neurons": {"method": "structured", "intermediate_size": 40},
    "heads": {"method": "structured", "num_key_value_heads": 1},
    "layers": {"method": "structured", "num_hidden_layers": 1},
    "all": {"method": "structured", "intermediate_size": 40, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "sparsity": {"method": "structured", "sparsity": 0.3},
}


@pytest.fixture
def cut(tiny: Callable[[str], Path], corpus: Path, tmp_path: Path) -> Callable[..., Block]:
    def make(family: str, recover: int = 0, out: str = "block", **target: object) -> Block:
        spec = BlockConfig(
            name="b",
            calibration=CalibrationConfig(text=str(corpus), samples=8, length=64),
            recover=RecoverConfig(steps=recover, batch_size=2, rank=4, learning_rate=0.01),
            **target,
        )
        base = tiny(family)
        (block,) = cut_blocks(base, fingerprint(base), [(spec, tmp_path / out)], 0, "fp32", Progress())
        return block

    return make


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("target", SHAPES.values(), ids=SHAPES)
def test_structured_blocks_are_smaller_and_load_plainly(
    family: str, target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    block = cut(family, **target)
    model = AutoModelForCausalLM.from_pretrained(block.path)
    dense = load_model(tiny(family))
    layers = model.model.layers
    assert len(layers) == len(block.coverage.layers) == model.config.num_hidden_layers
    kept = 0
    for j, layer in enumerate(block.coverage.layers):
        for module in LLAMA.modules:
            weight = layers[j].get_submodule(module).weight
            assert tuple(weight.shape) == block.coverage.matrix(layer, module)
            kept += weight.numel()
            if module not in ("self_attn.o_proj", "mlp.down_proj"):  # those two are refitted
                whole = dense.model.layers[layer].get_submodule(module).weight
                rows = block.coverage.rows(layer, module)
                assert torch.equal(weight, whole if rows is None else whole[rows])
    shape = shape_of(dense.config)
    assert block.sparsity == pytest.approx(1 - kept / (shape.layers * shape.layer_weights))
    assert block.parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.arange(20)[None]
    assert bool(model(tokens).logits.isfinite().all())


def test_a_sparsity_becomes_the_nearest_width(cut: Callable[..., Block]) -> None:
    # One layer: q, o 64x64, k, v 32x64, MLP 3x96x64: 30,720 weights; 0.3 of them are 48 neurons.
    block = cut("llama", method="structured", sparsity=0.3)
    assert [len(kept) for kept in block.coverage.neurons] == [48, 48]
    assert block.sparsity == pytest.approx(0.3)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("target", LINEARS.values(), ids=LINEARS)
def test_unstructured_blocks_have_their_zeros_where_the_mask_says(
    family: str, target: dict, cut: Callable[..., Block]
) -> None:
    block = cut(family, **target)
    model = AutoModelForCausalLM.from_pretrained(block.path)
    for layer, module in ((layer, module) for layer in range(2) for module in LLAMA.modules):
        mask = block.coverage.mask(layer, module)
        weight = model.model.layers[layer].get_submodule(module).weight
        assert bool((weight[~mask] == 0).all())
    assert block.sparsity == pytest.approx(target.get("sparsity", 0.5), abs=0.01)


@pytest.mark.parametrize(
    "target", [LINEARS["sparsegpt"] | {"refit": 0}, SHAPES["all"]], ids=["sparsegpt", "structured"]
)
def test_recovery_brings_the_block_nearer_to_the_llm_and_keeps_its_sparsity(
    target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path], corpus: Path
) -> None:
    plain, recovered = cut("llama", out="plain", **target), cut("llama", recover=40, out="recovered", **target)
    assert recovered.details["recover"]["kl_last"] < 0.9 * recovered.details["recover"]["kl_first"]
    dense = load_model(tiny("llama"))
    text = load_tokenizer(plain.path)(corpus.read_text()[:400], return_tensors="pt")["input_ids"]
    want = torch.log_softmax(dense(text).logits, -1)
    gaps = [
        float((want.exp() * (want - torch.log_softmax(load_model(block.path)(text).logits, -1))).sum(-1).mean())
        for block in (plain, recovered)
    ]
    assert gaps[1] < gaps[0]
    assert recovered.coverage.hash == plain.coverage.hash
    model = load_model(recovered.path)
    for key, mask in recovered.coverage.masks.items():
        layer, module = int(key.split(".")[1]), key.split(".", 2)[2]
        assert bool((model.model.layers[layer].get_submodule(module).weight[~mask] == 0).all())


def test_minutes_that_are_over_at_once_make_one_step(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    text, recovery = {"text": "pydoc", "length": 32}, {"minutes": 1e-9, "batch_size": 2, "rank": 4}
    spec = BlockConfig(name="b", method="magnitude", sparsity=0.5, calibration=text, recover=recovery)
    (block,) = cut_blocks(tiny("llama"), "print", [(spec, tmp_path / "b")], 0, "fp32", Progress())
    assert block.details["recover"]["steps"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_that_recover_on_the_same_text_share_the_pass_of_the_llm(
    precision: Precision, tiny: Callable[[str], Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, passes = importlib.import_module("legolm.prune.recover"), []
    real = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda model, packing: passes.append(1) or real(model, packing))
    base = tiny("llama")

    def cut(folder: Path, *steps: int) -> list[Block]:
        text = CalibrationConfig(text=str(corpus), samples=4, length=32)
        wanted = []
        for count in steps:
            recipe = RecoverConfig(steps=count, batch_size=2, rank=4)
            spec = BlockConfig(name=f"b{count}", method="magnitude", sparsity=0.5, calibration=text, recover=recipe)
            wanted.append((spec, folder / spec.name))
        return cut_blocks(base, fingerprint(base), wanted, 0, precision, Progress())

    together = cut(tmp_path / "together", 3, 2, 0)
    assert len(passes) == 3 + 2 + 3  # of the blocks, and of the LLM on three batches
    for block, steps in zip(together[:2], (3, 2), strict=True):
        (alone,) = cut(tmp_path / "alone", steps)
        one, two = (load_file(found.path / "model.safetensors") for found in (block, alone))
        assert all(torch.equal(one[key], two[key]) for key in two)


def test_a_block_has_the_dtype_of_the_llm(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    load_model(tiny("llama")).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer(tiny("llama")).save_pretrained(tmp_path / "half")
    spec = BlockConfig(name="b", method="magnitude", sparsity=0.5, recover=RecoverConfig(steps=1, batch_size=1))
    for steps, name in ((0, "cut"), (1, "recovered")):
        chosen = spec.model_copy(update={"recover": spec.recover.model_copy(update={"steps": steps})})
        cut_blocks(tmp_path / "half", "f", [(chosen, tmp_path / name)], 0, "fp32", Progress())
        assert load_config(tmp_path / name).dtype == torch.bfloat16
        found = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("target", [{"params": "60k"}, {"memory": "240k"}, {"sparsity": 0.5}])
def test_a_budget_is_met_and_filled(target: dict, cut: Callable[..., Block], tiny: Callable[[str], Path]) -> None:
    block = cut("llama", method="structured", **target)
    whole = sum(parameter.numel() for parameter in load_model(tiny("llama")).parameters())
    wanted = 60_000 if "sparsity" not in target else whole - 0.5 * 61_440
    # Between two widths lie 8 neurons of 3 x 64 weights in each layer.
    assert wanted - 2 * 8 * 192 < block.parameters <= wanted + (8 * 192 if "sparsity" in target else 0)


def test_blocks_cut_together_are_the_blocks_cut_alone(
    cut: Callable[..., Block], tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    alone = {name: cut("llama", out=name, **target) for name, target in (LINEARS | SHAPES).items()}
    text = CalibrationConfig(text=str(corpus), samples=8, length=64)
    wanted = [
        (BlockConfig(name=name.replace(":", "-"), calibration=text, **target), tmp_path / "together" / name)
        for name, target in (LINEARS | SHAPES).items()
    ]
    for block in cut_blocks(tiny("llama"), "f", wanted, 0, "fp32", Progress()):
        assert fingerprint(block.path) == fingerprint(alone[block.path.name].path)
        assert block.coverage.hash == alone[block.path.name].coverage.hash


def test_memory_that_is_short_changes_nothing(cut: Callable[..., Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states on disk, and the checkpoint in many shards."""
    plain = cut("llama", out="plain", **SHAPES["all"])
    monkeypatch.setattr("legolm.prune.calibrate.available_bytes", lambda: 0)
    monkeypatch.setattr("legolm.models.layered.SHARD_BYTES", 10_000)
    short = cut("llama", out="short", **SHAPES["all"])
    assert len(list(short.path.glob("model-*.safetensors"))) > 2
    tokens = torch.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(block.path)(tokens).logits for block in (plain, short))
    assert torch.equal(one, two)


@pytest.mark.parametrize("family", NAMES)
def test_chunks_give_the_block_of_one_pass(
    family: str, cut: Callable[..., Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: each matrix is cut on what those before it in its layer send, in whatever order the family runs them."""
    target = LINEARS["sparsegpt"] | {"refit": 0}  # fitted anew, rounding in one layer decides near ties in the next
    whole = cut(family, out="whole", **target)
    monkeypatch.setattr("legolm.prune.calibrate.total_bytes", lambda: 0)
    chunks = cut(family, out="chunks", **target)
    tokens = torch.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(block.path)(tokens).logits for block in (whole, chunks))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_dense_block_is_the_llm(cut: Callable[..., Block], tiny: Callable[[str], Path]) -> None:
    block = cut("llama", method="dense")
    assert block.sparsity == 0
    assert fingerprint(block.path) == fingerprint(tiny("llama"))


def test_refit_gives_back_the_output_when_kept_inputs_explain_the_cut_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(500, 3, generator=generator)
    inputs = torch.cat([kept, kept @ torch.randn(3, 2, generator=generator)], 1)
    weight = torch.randn(4, 5, generator=generator)
    fit = Regression(torch.nn.Linear(5, 4))
    fit.add(inputs, inputs @ weight.T)
    fitted = refit(fit, weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(kept @ fitted.T, inputs @ weight.T, rtol=0.02, atol=0.02)


def test_layer_by_layer_equals_the_whole_model(tiny: Callable[[str], Path]) -> None:
    for family in NAMES:
        model, layered = load_model(tiny(family)), LayeredModel(tiny(family))
        tokens = torch.arange(100).view(5, 20)
        stream = Stream.start(layered, tokens, "fp32")
        for index in range(2):
            with layered.layer(index) as layer:
                stream.advance(index, layer)
        torch.testing.assert_close(model.lm_head(model.model.norm(stream.hidden)), model(tokens).logits)
        assert all(parameter.is_meta for parameter in layered.layers.parameters())


def test_the_plan_has_the_size_of_the_cut(cut: Callable[..., Block], tiny: Callable[[str], Path]) -> None:
    base = Base.of(tiny("llama"), "", load_config(tiny("llama")))
    for target in SHAPES.values():
        block = cut("llama", out=str(sorted(target)), **target)
        assert planned_coverage(BlockConfig(name="b", **target), base).kept_weights == block.coverage.kept_weights


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"sparsity": 0.99}, "wants sparsity 0.99; this model gives 0 to 0.875"),
        ({"params": 100}, "wants params 100; this model gives 24640 to 78400"),
        ({"memory": "1k"}, "wants memory 1000; this model gives 98560 to 313600"),
        ({"speedup": 1000}, "wants speedup 1000.0; no shape here is as fast"),
        ({"intermediate_size": 97}, "the LLM has 96"),
        ({"num_hidden_layers": 3}, "the LLM has 2"),
    ],
)
def test_targets_that_cannot_be_met(target: dict, says: str, cut: Callable[..., Block], tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=says):
        cut("llama", method="structured", **target)
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_heads_that_the_family_refuses(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=8, head_dim=16, vocab_size=8
    )
    config.architectures = ["LlamaForCausalLM"]
    base = Base(tmp_path, "", config, shape_of(config), 10**6, torch.float32)
    with pytest.raises(LegolmError, match=r"llama does not take 3 KV groups of 1 heads .* multiple of"):
        given_shape(BlockConfig(name="b", method="structured", num_key_value_heads=3), base)
    offered = shapes_within(BlockConfig(name="b", method="structured", sparsity=0.3), base)
    assert {shape.kv_groups for shape in offered} <= {1, 2, 4, 8}


def test_a_group_that_does_not_divide_is_told(cut: Callable[..., Block]) -> None:
    with pytest.raises(LegolmError, match="has 64 columns, which 7 does not divide"):
        cut("llama", method="wanda", pattern="3:7")


def test_too_little_text_and_weights_that_are_not_finite(
    cut: Callable[..., Block], tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    spec = BlockConfig(
        name="b", method="wanda", sparsity=0.5, calibration=CalibrationConfig(text=str(corpus), samples=999, length=64)
    )
    with pytest.raises(LegolmError, match="samples of 64 tokens"):
        cut_blocks(tiny("llama"), "f", [(spec, tmp_path / "block")], 0, "fp32", Progress())
    broken = load_model(tiny("llama"))
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)  # finite, but what it makes is not
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(tiny("llama")).save_pretrained(tmp_path / "broken")
    with pytest.raises(LegolmError, match="layer 0 gives values that are not finite"):
        short = spec.model_copy(update={"calibration": CalibrationConfig(text=str(corpus), samples=4, length=64)})
        cut_blocks(tmp_path / "broken", "f", [(short, tmp_path / "block")], 0, "fp32", Progress())
    assert not (tmp_path / "block").exists()


def test_a_block_folder_that_was_tampered_with_is_refused(cut: Callable[..., Block]) -> None:
    block = cut("llama", method="structured", intermediate_size=40)
    manifest = json.loads((block.path / "manifest.json").read_text())
    (block.path / "manifest.json").write_text(json.dumps(manifest | {"coverage_hash": "0" * 64}))
    with pytest.raises(LegolmError, match="is not the one of its manifest"):
        read_block(block.path)
    (block.path / "manifest.json").write_text("{")
    with pytest.raises(LegolmError, match=r"manifest\.json is broken"):
        read_block(block.path)
    (block.path / "manifest.json").unlink()
    with pytest.raises(LegolmError, match=r"no manifest\.json"):
        read_block(block.path)


WINDOW = {"method": "window", "intermediate_size": 40, "num_key_value_heads": 1}


def test_a_window_keeps_units_by_their_place_and_weights_as_they_are(
    cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    whole = load_file(tiny("llama") / "model.safetensors")
    name = "model.layers.1.{}.weight"

    prefix = cut("llama", out="prefix", **WINDOW)  # HeteroFL: the first units
    assert prefix.coverage.layers == (0, 1)
    assert prefix.coverage.groups[1] == (0,)
    assert prefix.coverage.neurons[1] == tuple(range(40))
    held = load_file(prefix.path / "model.safetensors")
    assert torch.equal(held[name.format("mlp.up_proj")], whole[name.format("mlp.up_proj")][:40])
    assert torch.equal(held[name.format("mlp.down_proj")], whole[name.format("mlp.down_proj")][:, :40])
    width = len(whole[name.format("self_attn.q_proj")]) // 2  # of two groups
    assert torch.equal(held[name.format("self_attn.q_proj")], whole[name.format("self_attn.q_proj")][:width])

    neurons = len(whole[name.format("mlp.up_proj")])
    rolled = cut("llama", out="rolled", offset=neurons - 3, **WINDOW).coverage  # FedRolex: it goes on at the front
    assert rolled.neurons[0] == (*range(37), *range(neurons - 3, neurons))
    assert rolled.groups[0] == ((neurons - 3) % 2,)


def test_a_window_of_all_units_is_the_llm_and_one_of_layers_has_these(
    cut: Callable[..., Block], tiny: Callable[[str], Path]
) -> None:
    base = tiny("llama")
    whole = load_file(base / "model.safetensors")
    every = cut("llama", out="every", method="window", layers=[0, 1], offset=1)
    assert every.coverage.kept_weights == sum(t.numel() for key, t in whole.items() if "proj" in key)
    assert load_file(every.path / "model.safetensors").keys() == whole.keys()
    assert all(torch.equal(t, whole[key]) for key, t in load_file(every.path / "model.safetensors").items())
    upper = cut("llama", out="upper", method="window", layers=[1])
    held = load_file(upper.path / "model.safetensors")
    assert upper.coverage.layers == (1,)
    assert torch.equal(held["model.layers.0.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"method": "window", "num_hidden_layers": 1}, "`num_hidden_layers` is not for window"),
        ({"method": "structured", "intermediate_size": 40, "offset": 1}, "`offset` is not for structured"),
        ({"method": "structured", "layers": [0]}, "`layers` is not for structured"),
        ({"method": "window", "layers": [1, 0]}, "name each once, in ascending order"),
        ({"method": "window", "offset": 1}, "window takes one of a shape; here is none"),
        ({"method": "window", "layers": [0, 2]}, "wants layer 2; the LLM has 0 to 1"),
        ({"method": "window", "intermediate_size": 10_000}, "wants intermediate_size 10000; the LLM has"),
    ],
)
def test_a_window_that_cannot_be(target: dict, says: str, cut: Callable[..., Block], tmp_path: Path) -> None:
    with pytest.raises((LegolmError, ValidationError), match=says):
        cut("llama", **target)
    assert not (tmp_path / "block").exists()


def text_of(word: str) -> str:
    return "".join(f"{word} {i} says that {i * i} is the square of {i}.\n" for i in range(60))


@pytest.mark.parametrize("given", ["*.txt", "~/a.txt", "recover", "sums"])
def test_a_block_is_not_kept_where_any_file_of_its_text_changed(
    given: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text_of(name))
    raw: dict[str, Any] = {"text": given, "samples": 4, "length": 32}
    recovery: dict[str, Any] = {"steps": 1, "batch_size": 2} if given in ("recover", "sums") else {"steps": 0}
    if given == "recover":
        raw, recovery = raw | {"text": "pydoc"}, recovery | {"text": "?.txt"}
    if given == "sums":
        done = legolm("calibrate", tiny("llama"), "--text", "a.txt", "--samples", 4, "--length", 32, "--out", "sums")
        assert done.returncode == 0, done.stderr
        raw |= {"text": "a.txt", "statistics": ["sums"]}
    found = {"name": "b", "method": "wanda", "sparsity": 0.5, "calibration": raw, "recover": recovery}
    spec, base = BlockConfig(**found), tiny("llama")
    whose, tokenizer, recipe = fingerprint(base), load_tokenizer(base), recipe_of(spec, 0, "fp32")
    cut_blocks(base, whose, [(spec, tmp_path / "b")], 0, "fp32", Progress())
    assert kept_block(tmp_path / "b", whose, spec, 0, "fp32", tokenizer) is not None
    (tmp_path / "a.txt").write_text(text_of("another"))
    assert recipe_of(spec, 0, "fp32") != recipe  # by which runs and studies call the blocks that they share
    with pytest.raises(LegolmError, match="holds another block: files was"):
        kept_block(tmp_path / "b", whose, spec, 0, "fp32", tokenizer)


def test_a_block_of_one_plain_file_is_known_by_that_files_hash(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(text_of("a"))
    spec = BlockConfig(name="b", method="wanda", sparsity=0.5, calibration={"text": str(text)})
    assert recipe_of(spec, 0, "fp32")["files"] == {str(text): hashlib.sha256(text.read_bytes()).hexdigest()}
