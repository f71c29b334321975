"""Adapters and blocks of others: broken or lying ones give one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import assert_one_line, legolm
from legolm.adapter import init_factors, load_factors, read_adapter, save_adapter, save_factors
from legolm.block import Coverage, Manifest, read_block, write_block
from legolm.errors import LegolmError
from legolm.models import Shape

SHAPE = Shape("llama", layers=2, hidden=8, neurons=6, kv_groups=2, queries_per_group=1, head_dim=4)
WHOLE = Coverage.full(SHAPE)
WEIGHTS = "adapter_model.safetensors"
Change = Callable[[Path], object]


def config(**values: object) -> Change:
    def apply(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        change(found)
        save_file(found, path / WEIGHTS)

    return apply


FIRST = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-3]), f"{WEIGHTS}: is broken"),
        (
            lambda path: (path / WEIGHTS).write_bytes((100 << 20).to_bytes(8, "little")),
            "its header has 104857600 bytes",
        ),
        (lambda path: (path / WEIGHTS).unlink(), "no such file"),
        (tensors(lambda t: t.update({FIRST: t[FIRST].flatten()})), "which no factor is"),
        (tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int64)})), "which no factor is"),
        (tensors(lambda t: t.update({FIRST.replace("lora_A", "lora_C"): t.pop(FIRST)})), "is not a LoRA factor"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), "no readable adapter_config.json"),
        (lambda path: (path / "adapter_config.json").write_text("[" * 10**5), "no readable adapter_config.json"),
        (config(lora_alpha="x"), "lora_alpha is"),
        (config(lora_alpha=float("inf")), "lora_alpha is Infinity"),
        (config(r=10**9), "r is 1000000000; must be a number up to"),
        (config(alpha_pattern={"up_proj": None}), "up_proj is null"),
    ],
)
def test_a_broken_adapter_is_one_line(tmp_path: Path, change: Change, says: str) -> None:
    path = tmp_path / "adapter"
    save_adapter(WHOLE, init_factors(SHAPE, ["up_proj"], 2, seed=0), 2.0, "base", path)
    assert len(read_adapter(path, WHOLE, "lora.start")) == 4
    change(path)
    with pytest.raises(LegolmError, match=r"^lora\.start") as caught:
        read_adapter(path, WHOLE, "lora.start")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_alpha_that_is_not_said_is_pefts(tmp_path: Path) -> None:
    save_adapter(WHOLE, init_factors(SHAPE, ["up_proj"], 2, seed=0), 4.0, "base", tmp_path / "a")
    before = read_adapter(tmp_path / "a", WHOLE, "")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said.pop("lora_alpha") == 8
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    after = read_adapter(tmp_path / "a", WHOLE, "")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("header", ['{"scale": 1e999, "start": "s"}', '{"scale": "x", "start": "s"}', "[]", "{}", "{"])
def test_broken_factors_are_one_line(tmp_path: Path, header: str) -> None:
    save_factors(init_factors(SHAPE, ["up_proj"], 2, seed=0), 2.0, "s", tmp_path)
    found = load_file(tmp_path / "factors.safetensors")
    save_file(found, tmp_path / "factors.safetensors", {"legolm": header})
    with pytest.raises(LegolmError, match=r"factors\.safetensors: is broken \("):
        load_factors(tmp_path)


def test_a_block_that_is_broken_is_one_line_everywhere(tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.mkdir()
    manifest = Manifest(
        name="b", method="dense", base_fingerprint="f", coverage_hash=WHOLE.hash, parameters=1, sparsity=0.0
    )
    write_block(manifest, WHOLE, block)
    save_factors(init_factors(SHAPE, ["up_proj"], 2, seed=0), 2.0, "s", block)
    assert read_block(block).coverage == WHOLE
    whole = (block / "coverage.safetensors").read_bytes()
    for content in (whole[:-1], b"", (2**40).to_bytes(8, "little") + whole[8:], whole[:8] + b"[" * (len(whole) - 8)):
        (block / "coverage.safetensors").write_bytes(content)
        assert_one_line(legolm("inspect", block), "coverage.safetensors: is broken")
        out = ("--into", "llm", "--out", tmp_path / "out")
        assert_one_line(legolm("compose", block, *out, "--dry-run"), "coverage.safetensors: is broken")
        assert_one_line(legolm("compose", block, *out), "coverage.safetensors: is broken")
    assert not (tmp_path / "out").exists()
