"""Adapters on disk: PEFT loads what is saved, a run starts from what PEFT saved, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from legolm.adapter import Tensors, init_factors, load_adapter, merged, save_adapter, slice_factors
from legolm.block import Block, Coverage
from legolm.config import BlockConfig, CalibrationConfig
from legolm.errors import LegolmError
from legolm.models import fingerprint, load_model, shape_of
from legolm.prune import cut_blocks
from legolm.system import Progress

TEXT = torch.arange(1, 21)[None]


def factors_of(coverage: Coverage, rank: int = 4) -> Tensors:
    start = init_factors(coverage.shape, None, rank, seed=1, ranks={"down_proj": 2})
    torch.manual_seed(0)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in slice_factors(coverage, start, rank).items()}


@pytest.fixture
def block(tiny: Callable[[str], Path], corpus: Path, tmp_path: Path) -> Callable[..., Block]:
    def cut(**target: object) -> Block:
        base = tiny("llama")
        text = CalibrationConfig(text=str(corpus), samples=4, length=64)
        spec = BlockConfig(name="b", calibration=text, **target)
        return cut_blocks(base, fingerprint(base), [(spec, tmp_path / "block")], 0, "fp32", Progress())[0]

    return cut


def test_peft_loads_it_on_the_block(block: Callable[..., Block], tmp_path: Path) -> None:
    small = block(method="structured", num_hidden_layers=1, num_key_value_heads=1, intermediate_size=40)
    factors = factors_of(small.coverage)
    save_adapter(small.coverage, factors, 1.5, str(small.path), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with merged(load_model(small.path), small.coverage, factors, 1.5) as model:
        torch.testing.assert_close(loaded(TEXT).logits, model(TEXT).logits, rtol=1e-4, atol=1e-5)


def test_an_unstructured_block_has_no_portable_adapter(block: Callable[..., Block], tmp_path: Path) -> None:
    sparse = block(method="magnitude", sparsity=0.5)
    with pytest.raises(LegolmError, match="under its mask only; merge it"):
        save_adapter(sparse.coverage, factors_of(sparse.coverage), 1.5, "", tmp_path / "adapter")


def peft_adapter(base: Path, folder: Path, **settings: object) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(plain, LoraConfig(**targets | settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_a_run_can_start_from_pefts(rslora: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny("llama")
    theirs = peft_adapter(base, tmp_path / "adapter", use_rslora=rslora, alpha_pattern={"down_proj": 6})
    model = load_model(base)
    coverage = Coverage.full(shape_of(model.config))
    usual = init_factors(coverage.shape, None, 4, seed=1)
    start = load_adapter(tmp_path / "adapter", usual, coverage.shape, 2.0)
    with merged(model, coverage, start, 2.0):
        torch.testing.assert_close(model(TEXT).logits, theirs(TEXT).logits, rtol=1e-4, atol=1e-5)
    # What the adapter does not have can still be learnt: A is the usual start, B zero.
    assert torch.equal(start["layers.0.self_attn.q_proj.A"][3], usual["layers.0.self_attn.q_proj.A"][3])
    assert torch.equal(start["layers.1.mlp.up_proj.A"], usual["layers.1.mlp.up_proj.A"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"r": 5}, r"has rank 5; raise lora\.rank \(now 4\)"),
        ({"target_modules": ["up_proj"]}, "mlp.up_proj, which lora.targets leaves out"),
    ],
    ids=str,
)
def test_what_cannot_be_averaged_is_refused(
    settings: dict, says: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny("llama")
    peft_adapter(base, tmp_path / "adapter", **settings)
    shape = shape_of(load_model(base).config)
    with pytest.raises(LegolmError, match=says):
        load_adapter(tmp_path / "adapter", init_factors(shape, ["q_proj", "down_proj"], 4, 1), shape, 2.0)


def test_a_folder_that_holds_no_adapter(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shape = shape_of(load_model(tiny("llama")).config)
    with pytest.raises(LegolmError, match=r"no readable adapter_config\.json"):
        load_adapter(tmp_path, {}, shape, 2.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(LegolmError, match="is IA3; only LoRA"):
        load_adapter(tmp_path, {}, shape, 2.0)
