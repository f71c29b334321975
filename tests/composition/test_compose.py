"""Folders in, a folder out: what comes back, what stays the LLM's, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import legolm as lg
from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import Tensors, adapter_keys, factor_shape, merge, save_adapter, save_factors
from legolm.block import Block, Coverage, Manifest, read_block, write_block
from legolm.composition import choose_method, compose, plan
from legolm.config import Fields, RowsConfig
from legolm.data import read_rows, render, to_example
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.models import decoder_layers, fingerprint, load_config, load_model, load_tokenizer, shape_of
from legolm.system import Progress

QUIET = Progress()
EXACT = choose_method("heteagg", None, None, None)


@pytest.fixture(scope="module")
def run(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks trained alone: a narrow one, one layer with one KV group, an unstructured one."""
    folder = tmp_path_factory.mktemp("alone")
    federation = {"engine": "local", "rounds": 1}
    holds = ("wide", "half", "sparse")
    raw = three_clients(folder, holds, rows=24, aggregate={"form": "factor"}, federation=federation | {"mode": "alone"})
    # Not all have as many examples: the default weights differ.
    few = folder / "data" / "fr.jsonl"
    few.write_text("".join(few.read_text().splitlines(keepends=True)[:12]))
    raw["clients"][1]["rank"] = 2
    (folder / "run.yaml").write_text(json.dumps(raw))
    pipeline.run(configs.load(folder / "run.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture
def llm(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


def put(sources: list[Path | str], into: str, out: Path, base: Path | None = None, **given: str) -> Block:
    chosen = choose_method(given.get("method", "heteagg"), given.get("form"), None, None)
    names = [str(source) for source in sources]
    weights = given.get("weights", ",".join("1" for _ in sources))
    wanted = plan(names, into, str(base) if base else None, chosen, weights, None, QUIET)
    return compose(wanted, out, QUIET)


def weights_of(path: Path) -> Tensors:
    return dict(load_model(path).state_dict())


def made(path: Path, llm: Path, coverage: Coverage, seed: int, fingerprint_: str | None = None) -> tuple[Path, Tensors]:
    """A source without a checkpoint, which composing does not need: coverage, manifest, random factors of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    keys = adapter_keys(coverage, None)
    factors = {key: torch.randn(factor_shape(coverage, key, 2), generator=generator) / 8 for key in keys}
    path.mkdir()
    save_factors(factors, 1.0, "start", path)
    base = fingerprint_ or fingerprint(llm)
    write_block(Manifest(name=path.name, method="m", base_fingerprint=base, coverage_hash=coverage.hash,
                         parameters=1, sparsity=coverage.sparsity), coverage, path)  # fmt: skip
    return path, factors


def merged_llm(llm: Path, coverage: Coverage, factors: Tensors) -> Tensors:
    """What the LLM's own part of a block becomes with these factors: {module name: the block's slice}."""
    model = load_model(llm)
    found = {}
    for layer in coverage.layers:
        for module in coverage.shape.modules:
            linear = decoder_layers(model)[layer].get_submodule(module)
            rows, cols = coverage.rows(layer, module), coverage.cols(layer, module)
            weight = linear.weight if rows is None else linear.weight[rows]
            weight = weight if cols is None else weight[:, cols]
            key = f"layers.{layer}.{module}"
            found[f"{layer}.{module}"] = weight + factors[f"{key}.B"] @ factors[f"{key}.A"]
    return found


@pytest.mark.parametrize("client", ["fr", "de", "es"])
@pytest.mark.parametrize("given", [{"form": "exact"}, {"form": "factor"}, {"method": "task_arithmetic"}], ids=str)
def test_one_block_into_its_own_shape_gives_its_final_checkpoint(
    run: Path, tmp_path: Path, client: str, given: dict[str, str]
) -> None:
    final = run / "final" / client
    own = run / "blocks" / {"fr": "wide", "de": "half", "es": "sparse"}[client]
    block = put([final], str(own), tmp_path / "out", **given)
    before, expected, found = weights_of(own), weights_of(final), weights_of(tmp_path / "out")
    assert block.coverage.hash == read_block(own).coverage.hash
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(before[name], tensor, atol=1e-4) for name, tensor in expected.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_order_of_sources_does_not_matter(run: Path, tmp_path: Path) -> None:
    finals = [run / "final" / client for client in ("fr", "de", "es")]
    put([*finals], "llm", tmp_path / "one", weights="1,2,3")
    put([*reversed(finals)], "llm", tmp_path / "two", weights="3,2,1")
    two = weights_of(tmp_path / "two")
    for name, tensor in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["heteagg", "task_arithmetic"])
def test_two_disjoint_blocks_stack_into_one_that_has_both(llm: Path, tmp_path: Path, method: str) -> None:
    shape = shape_of(load_config(llm))
    left = Coverage(shape, (0, 1), ((0,), (0,)), (tuple(range(40)),) * 2)
    right = Coverage(shape, (0, 1), ((1,), (1,)), (tuple(range(50, 90)),) * 2)
    sources = [
        made(tmp_path / name, llm, one, seed) for seed, (name, one) in enumerate({"l": left, "r": right}.items())
    ]
    block = put([path for path, _ in sources], "union", tmp_path / "out", llm, method=method)
    assert block.coverage.groups == ((0, 1),) * 2
    assert block.coverage.neurons == ((*range(40), *range(50, 90)),) * 2
    model = load_model(tmp_path / "out")
    for j, (one, (_, factors)) in enumerate(zip((left, right), sources, strict=True)):
        for name, expected in merged_llm(llm, one, factors).items():
            layer, module = name.split(".", 1)
            weight = decoder_layers(model)[int(layer)].get_submodule(module).weight
            spec = shape.module(module)
            part = torch.arange(len(weight if spec.cols == "hidden" else weight.T)).chunk(2)[j]
            found = weight[part] if spec.cols == "hidden" else weight[:, part]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_nobody_holds_stays_the_llms(run: Path, llm: Path, tmp_path: Path) -> None:
    shape = shape_of(load_config(llm))
    path, _ = made(tmp_path / "a", llm, Coverage(shape, (1,), ((1,),), ((2, 3, 5),)), 0)
    before = weights_of(llm)
    for i, given in enumerate(
        ({"form": "exact"}, {"form": "factor"}, {"method": "task_arithmetic"}, {"method": "ties"})
    ):
        put([path], "llm", tmp_path / f"out{i}", llm, **given)
        after = weights_of(tmp_path / f"out{i}")
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {f"model.layers.1.{module}.weight" for module in shape.modules}
        up = after["model.layers.1.mlp.up_proj.weight"] != before["model.layers.1.mlp.up_proj.weight"]
        o = after["model.layers.1.self_attn.o_proj.weight"] != before["model.layers.1.self_attn.o_proj.weight"]
        moved = {*up.any(1).nonzero().flatten().tolist()}, {*o.any(0).nonzero().flatten().tolist()}
        held = {2, 3, 5}, set(range(32, 64))  # KV group 1: two heads of 16
        # TIES trims, and may leave a whole row or column of what is held.
        assert all(a <= b for a, b in zip(moved, held, strict=True)) if "ties" in given.values() else moved == held
    # An unstructured block's dropped weights are the LLM's in the LLM, and dropped in the union.
    mask = read_block(run / "final" / "es").coverage.masks["layers.0.mlp.up_proj"]
    name = "model.layers.0.mlp.up_proj.weight"
    put([run / "final" / "es"], "llm", tmp_path / "whole")
    assert torch.equal((weights_of(tmp_path / "whole")[name] == before[name]), ~mask)
    union = put([run / "final" / "es"], "union", tmp_path / "union")
    assert torch.equal(union.coverage.masks["layers.0.mlp.up_proj"], mask)
    assert torch.equal(weights_of(tmp_path / "union")[name] == 0, ~mask)


def test_a_shape_takes_the_unions_units_and_then_the_llms(llm: Path, tmp_path: Path) -> None:
    shape = shape_of(load_config(llm))
    path, _ = made(tmp_path / "a", llm, Coverage(shape, (1,), ((1,),), ((2, 3, 50),)), 0)
    block = put([path], "layers=2,neurons=6", tmp_path / "out", llm)
    assert block.coverage.layers == (0, 1)
    assert block.coverage.groups == ((0,), (1,))
    assert block.coverage.neurons == ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 50))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 6
    before, after = weights_of(llm), weights_of(tmp_path / "out")
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"][:6])
    for into, nearest in (
        ("neurons=2, kv_groups=1", "layers=1,kv_groups=1,neurons=3"),
        ("layers=3,neurons=1", "layers=2,kv_groups=1,neurons=3"),
        ("kv_groups=9", "layers=1,kv_groups=2,neurons=3"),
    ):
        with pytest.raises(LegolmError, match=f"the nearest shape that can is {nearest}$"):
            put([path], into, tmp_path / "x", llm)


def test_every_family_composes(variant: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llm = tiny(variant)
    shape = shape_of(load_config(llm))
    whole = tuple(range(shape.kv_groups))
    one = Coverage(shape, (0, 1), (whole,) * 2, (tuple(range(10, 50)), tuple(range(40))))
    path, factors = made(tmp_path / "a", llm, one, 0)
    block = put([path], "union", tmp_path / "out", llm)
    assert block.coverage.hash == one.hash
    assert block.parameters < read_parameters(llm)
    assert bool(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all())
    model = load_model(tmp_path / "out")
    for name, expected in merged_llm(llm, one, factors).items():
        layer, module = name.split(".", 1)
        weight = decoder_layers(model)[int(layer)].get_submodule(module).weight
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def read_parameters(path: Path) -> int:
    return sum(tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(path).parameters())


def test_a_peft_adapter_beside_its_block(run: Path, llm: Path, tmp_path: Path) -> None:
    block = read_block(run / "blocks" / "half")
    keys = adapter_keys(block.coverage, ["q_proj", "down_proj"])
    factors = {key: torch.randn(factor_shape(block.coverage, key, 2)) / 8 for key in keys}
    save_adapter(block.coverage, factors, 3.0, str(block.path), tmp_path / "adapter")
    put([f"{block.path}:{tmp_path / 'adapter'}"], str(block.path), tmp_path / "out")
    model = load_model(block.path)
    merge(model, block.coverage, factors, 3.0)
    found = weights_of(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_weights_by_examples_by_hand_and_by_loss(run: Path, tmp_path: Path) -> None:
    names = [str(run / "final" / client) for client in ("fr", "de")]

    def weights(given: str | None, validate: str | None, rows: RowsConfig | None = None) -> list[float]:
        return plan(names, "llm", None, EXACT, given, validate, QUIET, rows).weights

    counts = [read_block(Path(name)).details["examples"] for name in names]
    assert counts[1] > counts[0]
    assert weights(None, None) == pytest.approx([2 * count / sum(counts) for count in counts])
    assert weights("1,3", None) == pytest.approx([0.5, 1.5])
    data = tmp_path / "v.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say {i}", "output": "fr"}) + "\n" for i in range(4)))
    losses = []
    for name in names:
        tokenizer = load_tokenizer(Path(name))
        rows = [render(to_example(row, RowsConfig()), tokenizer, 512) for row in read_rows(str(data), "data")]
        losses.append(score(load_model(Path(name)), rows, 8, "fp32").loss)
    scale = 2 / sum(math.exp(-loss) for loss in losses)
    assert weights(None, str(data)) == pytest.approx([scale * math.exp(-loss) for loss in losses], rel=1e-4)
    with pytest.raises(LegolmError, match="give one of them"):
        weights("1,3", str(data))
    named = tmp_path / "named.jsonl"
    named.write_text(data.read_text().replace("instruction", "question").replace("output", "reply"))
    fields = RowsConfig(fields=Fields(instruction="question", answer="reply"))
    assert weights(None, str(named), fields) == weights(None, str(data))


def test_bad_input_is_one_line(run: Path, llm: Path, tmp_path: Path) -> None:
    shape = shape_of(load_config(llm))
    fr, wide = run / "final" / "fr", run / "blocks" / "wide"
    foreign, _ = made(tmp_path / "foreign", llm, Coverage.full(shape), 0, "f" * 64)
    other, _ = made(tmp_path / "other", llm, Coverage.full(shape), 0)
    full = read_block(wide).coverage
    few = {key: torch.zeros(factor_shape(full, key, 2)) for key in adapter_keys(full, ["q_proj"])}
    save_adapter(full, few, 1.0, "x", tmp_path / "few")

    def fails(says: str, sources: list[Path | str], into: str = "llm", base: Path | None = None, **given: str) -> None:
        with pytest.raises(LegolmError, match=re.escape(says)) as caught:
            put(sources, into, tmp_path / "x", base, **given)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x").exists()

    fails("was cut from another base model", [fr, foreign])
    fails("train them with the same lora.targets", [fr, f"{wide}:{tmp_path / 'few'}"])
    fails("has no factors.safetensors", [wide])
    fails("no readable adapter_config.json", [f"{wide}:{tmp_path / 'nothing'}"])
    some = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    get_peft_model(load_model(wide), some).save_pretrained(tmp_path / "some")
    fails("is missing; an adapter must be on the same modules in every layer", [f"{wide}:{tmp_path / 'some'}"])
    changed = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(load_model(wide), changed).save_pretrained(tmp_path / "changed")
    fails("init_lora_weights is 'pissa'", [f"{wide}:{tmp_path / 'changed'}"])
    fails("no manifest.json", [tmp_path / "nothing"])
    fails("give it", [other])
    fails("is not the LLM that the blocks were cut from", [foreign], base=llm)
    moved = tmp_path / "moved"
    unsealed = shutil.ignore_patterns("hashes.json")
    shutil.copytree(fr, moved, ignore=unsealed)
    for recorded in ("/gone", 5):
        manifest = json.loads((fr / "manifest.json").read_text())
        manifest["details"]["model"] = recorded
        (moved / "manifest.json").write_text(json.dumps(manifest))
        fails("record no LLM that is here", [moved])
        assert plan([str(moved), str(run / "final" / "de")], "llm", None, EXACT, None, None, QUIET).model == str(llm)
    fails("fr: is given twice", [fr, other, fr])
    fails("final/fr: is given twice", [fr, f"{run}/final/../final/fr"])
    shutil.copytree(run / "final" / "de", tmp_path / "nan", ignore=unsealed)
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    broken = {key: tensor * math.nan if "down_proj" in key else tensor for key, tensor in weights.items()}
    save_file(broken, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    data = tmp_path / "v.jsonl"
    data.write_text(json.dumps({"instruction": "Say", "output": "fr"}) + "\n")
    says = r"nan/model.safetensors: tensor model.layers.\d.mlp.down_proj.weight is not finite"
    with pytest.raises(LegolmError, match=says):
        plan([str(fr), str(tmp_path / "nan")], "llm", None, EXACT, None, str(data), QUIET)
    (tmp_path / "nan" / "factors.safetensors").unlink()
    fails("mlp.down_proj.weight is not finite", [fr], into=str(tmp_path / "nan"))
    fails("merged already, and the adapter would hide it", [f"{fr}:{fr / 'adapter'}"])
    fails("has its own weights", [fr], into=str(wide), base=llm)
    fails("did not start from one adapter", [fr, other], form="factor")
    fails("has learned something already", [fr], into=str(run / "final" / "fr"))
    assert put([fr], "union", tmp_path / "once").method == "composed"
    fails("has learned something already", [fr], into=str(tmp_path / "once"))
    fails("was cut from another base model", [foreign], into=str(wide))
    fails("must be llm, union, sizes", [fr], into="somewhere")
    fails("did you mean `neurons`", [fr], into="neuron=3")
    fails("must be a number from 1", [fr], into="neurons=0")
    fails("a number above 0, at most 1e+12, for each of the 1 sources", [fr], weights="1,2")
    fails("write numbers with commas", [fr], weights="one")
    with pytest.raises(LegolmError, match="give --weights or --validate"):
        plan([str(other)], "llm", str(llm), EXACT, None, None, QUIET)
    wrong = made(tmp_path / "wrong", llm, Coverage.full(shape), 0)[1]
    save_factors(wrong | {"layers.0.mlp.up_proj.B": torch.zeros(96, 3)}, 1.0, "start", tmp_path / "wrong")
    fails("layers.0.mlp.up_proj.B has shape (96, 3)", [tmp_path / "wrong"])
    save_factors({key: tensor for key, tensor in wrong.items() if key != "layers.0.mlp.up_proj.B"}, 1.0, "s",
                 tmp_path / "wrong")  # fmt: skip
    fails("layers.0.mlp.up_proj.B is missing", [tmp_path / "wrong"])
    (broken := tmp_path / "broken").mkdir()
    for file in other.iterdir():
        shutil.copy(file, broken)
    (broken / "factors.safetensors").write_bytes(b"no tensors")
    fails("is broken (its header has", [broken])


def test_nothing_that_is_there_is_replaced(run: Path, tmp_path: Path) -> None:
    sources = [run / "final" / "fr", run / "final" / "de"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(run.rglob("*"))
    for out in (tmp_path / "mine", tmp_path / "link", run / "final"):
        for call in (lambda out=out: lg.compose(sources, "union", out), lambda out=out: put([*sources], "union", out)):
            with pytest.raises(LegolmError, match=f"--out {out}: is already there; give another one"):
                call()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine" and sorted(run.rglob("*")) == before


def test_the_command(run: Path, tmp_path: Path) -> None:
    sources = (run / "final" / "fr", run / "final" / "de")
    done = legolm("compose", *sources, "--into", "union", "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    # Both blocks: layers 0 and 1, 2 KV groups, of layer 1 (or 0) all 96 neurons, so that both layers have 96.
    assert all(word in done.stdout for word in ("target", "61,440 linear weights", "Nothing was written."))
    assert not (tmp_path / "out").exists()
    typo = legolm("compose", f"{run}:frr", "--into", "union", "--out", tmp_path / "out")
    assert_one_line(typo, "no final model 'frr'; did you mean `fr`?")
    typo = legolm("compose", f"{run}x:fr", "--into", "union", "--out", tmp_path / "out")
    assert_one_line(typo, f"there is no folder {run}x; give RUN:CLIENT")
    done = legolm("compose", *sources, "--into", "union", "--out", tmp_path / "out", "--method", "ties")
    assert done.returncode == 0, done.stderr
    assert legolm("inspect", tmp_path / "out").returncode == 0
    named = f"{run}:fr", f"{run}:de"
    done = legolm("compose", *named, "--into", "union", "--out", tmp_path / "named", "--method", "ties")
    assert done.returncode == 0, done.stderr
    by_folder, by_name = weights_of(tmp_path / "out"), weights_of(tmp_path / "named")
    assert by_folder.keys() == by_name.keys()
    assert all(torch.equal(by_folder[key], by_name[key]) for key in by_folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say 1", "output": "fr"}) + "\n")
    assert legolm("eval", tmp_path / "out", "--data", rows).returncode == 0  # its LLM is what the sources recorded
    done = legolm("eval", f"{run}:fr", f"{run}:llm", "--data", rows, "--out", tmp_path / "eval.json")
    assert done.returncode == 0, done.stderr
    asked = {one["model"] for one in json.loads((tmp_path / "eval.json").read_text())["results"]}
    assert asked > {f"{run}:fr", f"{run}:llm"}
    assert_one_line(legolm("eval", f"{run}:frr", "--data", rows), "no final model 'frr'; did you mean `fr`?")
    shutil.copytree(run / "blocks" / "wide", tmp_path / "rate=0.1")
    into = legolm("compose", *sources, "--into", tmp_path / "rate=0.1", "--out", tmp_path / "in", "--dry-run")
    assert into.returncode == 0, into.stderr
    again = legolm("compose", *sources, "--into", "union", "--out", tmp_path / "out")
    assert_one_line(again, "is already there; give another one")
    assert_one_line(legolm("compose", *sources, "--into", "x", "--out", tmp_path / "x"), "must be llm, union, sizes")
