"""What a checkpoint's folder holds: which weights are the model's, and what goes along into whatever is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.block import read_block
from legolm.models import count_parameters, fingerprint, load_config, load_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = {"eos_token_id": [257, 65], "do_sample": True, "temperature": 0.6, "auto_map": {"x": "x.X"}}


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def prune(model: Path, out: Path) -> Path:
    done = legolm("prune", model, "--out", out, "--method", "magnitude", "--sparsity", "0.5")
    assert done.returncode == 0, done.stderr
    return out


def assert_kept(folder: Path) -> None:
    """As `furnished` made it, with nothing that asks for code."""
    found = GenerationConfig.from_pretrained(folder)
    assert (found.eos_token_id, found.temperature) == ([257, 65], 0.6)
    assert (folder / "tokenizer.model").read_bytes() == b"\0pieces"
    assert (folder / "LICENSE.txt").read_text() == "terms"
    assert (folder / "USE_POLICY.md").read_text() == "use"
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("{# own #}")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text()), name
    assert not list(folder.glob("*.py"))
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # would look for the code
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def furnished(model: Path) -> Path:
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    (model / "tokenizer.model").write_bytes(b"\0pieces")
    (model / "LICENSE.txt").write_text("terms")
    (model / "USE_POLICY.md").write_text("use")
    template = json.loads((model / "tokenizer_config.json").read_text()).pop("chat_template", None)
    template = template or (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{# own #}" + template)
    own = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change(model / "config.json", auto_map=own)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    return model


def test_what_goes_along_is_in_every_block_and_final_and_composed_model(
    furnished: Path, three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("wide", "dense", "dense"), rows=10, model=str(furnished))
    raw["federation"]["rounds"] = 1
    raw["blocks"][0]["recover"] = {"steps": 1, "batch_size": 1, "rank": 2}
    raw["train"]["steps"] = 1
    raw["evaluate"] = {"local_only": False, "others": 1}
    out = tmp_path / "out"
    pipeline.run(configs.validate(configs.RunConfig, raw, "test"), out)
    for folder in (out / "blocks" / "wide", *(out / "final" / name for name in ("llm", "fr", "de"))):
        assert_kept(folder)
    done = legolm("compose", out / "final" / "fr", "--into", "union", "--out", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert_kept(tmp_path / "made")
    assert_kept(prune(furnished, tmp_path / "pruned"))


def shards(path: Path, index: bool) -> dict[str, torch.Tensor]:
    """The model's weights in two shards in place of one file; those weights."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names, placed = sorted(tensors), {}
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, path / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if index:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tensors


@pytest.mark.parametrize("layout", ["one file", "index", "index and one file", "no index"])
def test_other_weights_beside_the_models_are_none_of_it(layout: str, model: Path, tmp_path: Path) -> None:
    parameters, digest = count_parameters(model), fingerprint(model)
    tensors = load_file(model / WEIGHTS) if layout == "one file" else shards(model, "no" not in layout)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, model / "other.safetensors", {"format": "pt"})
    save_file({f"x.{name}": one for name, one in zeros.items()}, model / "consolidated.safetensors")
    if "and one file" in layout:
        save_file(zeros, model / WEIGHTS, {"format": "pt"})
    assert (count_parameters(model), fingerprint(model)) == (parameters, digest)
    loaded = load_model(model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())
    block = prune(model, tmp_path / "block")
    found = load_file(block / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert torch.equal(found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert read_block(block).parameters == parameters


@pytest.mark.parametrize(("stored", "said"), [("bfloat16", None), ("float32", "bfloat16"), ("float16", "float32")])
def test_the_dtype_is_the_stored_one(stored: str, said: str | None, model: Path, tmp_path: Path) -> None:
    dtype = getattr(torch, stored)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / WEIGHTS).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # as many keep their norms
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    change(model / "config.json", dtype=said, torch_dtype=said)
    assert load_config(model).dtype == dtype
    block = prune(model, tmp_path / "block")
    assert {tensor.dtype for tensor in load_file(block / WEIGHTS).values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(block, dtype="auto").dtype == dtype


def test_a_head_that_is_not_stored_is_named(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", tie_word_embeddings=False)
    done = legolm("prune", model, "--out", tmp_path / "block", "--method", "magnitude", "--sparsity", "0.5")
    assert_one_line(done, "lm_head.weight, missing")
    assert not (tmp_path / "block").exists()
