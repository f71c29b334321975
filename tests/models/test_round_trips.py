"""Every family there and back, on tiny random models: cut, save, plain load, PEFT and back, the same perplexity."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from legolm.adapter import init_factors, merged, read_adapter, save_adapter, slice_factors
from legolm.block import Coverage
from legolm.config import BlockConfig, CalibrationConfig
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.models import (
    Head,
    LayeredModel,
    answer_losses,
    decoder_layers,
    fingerprint,
    hidden_states,
    import_model,
    layout_of,
    lean,
    load_config,
    load_model,
    load_tokenizer,
    pack,
)
from legolm.prune import cut_blocks
from legolm.prune.calibrate import Stream
from legolm.prune.moments import Regression
from legolm.prune.select import refit
from legolm.system import Progress

TOKENS = torch.arange(2, 122).view(3, 40)
FAMILIES = [
    "llama-3", "mistral", "ministral", "ministral3", "qwen2-window", "qwen3", "gemma2", "gemma3-three", "smollm3",
    "granite", "olmo2", "olmo3", "phi3", "phi-4-mini", "starcoder2", "gpt_neox", "gpt2", "opt", "opt-350m",
]  # fmt: skip
"""Of `VARIANTS` and `ROUND_TRIPS`: each row of docs/pruning.md's table has one here."""
SIZES = {
    "neurons": ("intermediate_size", 40),
    "kv_groups": ("num_key_value_heads", 1),
    "layers": ("num_hidden_layers", 2),
}


def plain_loss(model: Any) -> Tensor:
    """Nats a token, as transformers' own forward gives the logits."""
    with torch.no_grad():
        return cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def our_loss(model: Any) -> Tensor:
    packing = pack([Tokens(tuple(row.tolist()), 1) for row in TOKENS], torch.device("cpu"))
    with torch.no_grad(), lean(model, "fp32"):
        states = hidden_states(model, packing)[packing.predict]
        return answer_losses(states, Head.of(model, "fp32"), packing.labels).mean()


def weight(model: Any, layer: int, name: str) -> Tensor:
    module = decoder_layers(model)[layer].get_submodule(name)
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def factors_for(coverage: Coverage) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    start = slice_factors(coverage, init_factors(coverage.shape, None, 3, seed=1), 3)
    return {key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in start.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tiny: Callable[[str], Path], corpus: Path, tmp_path: Path) -> None:
    base = tiny(family)
    config = load_config(base)
    layout = layout_of(config)
    text = CalibrationConfig(text=str(corpus), samples=4, length=32)
    sizes = {name: size for field, (name, size) in SIZES.items() if field not in layout.fixed}
    if config.num_hidden_layers == 2 and "num_hidden_layers" in sizes:
        sizes["num_hidden_layers"] = 1
    specs = [BlockConfig(name="wanda", method="wanda", sparsity=0.5, calibration=text)]
    if family in ("gpt2", "opt", "opt-350m"):
        specs.append(BlockConfig(name="sparsegpt", method="sparsegpt", pattern="2:4", calibration=text))
        specs.append(BlockConfig(name="magnitude", method="magnitude", sparsity=0.5))
    if sizes:
        specs.append(BlockConfig(name="small", method="structured", calibration=text, **sizes))
    wanted = [(spec, tmp_path / spec.name) for spec in specs]
    blocks = cut_blocks(base, fingerprint(base), wanted, 0, "fp32", Progress())

    for block in blocks:
        plain, said = AutoModelForCausalLM.from_pretrained(block.path, output_loading_info=True)
        assert not any(said.values())
        coverage, ours = block.coverage, load_model(block.path)
        torch.testing.assert_close(our_loss(ours), plain_loss(plain), rtol=1e-4, atol=1e-5)
        for j, layer in enumerate(coverage.layers):
            for name in coverage.shape.modules:
                mask = coverage.mask(layer, name)
                found = weight(plain, j, name)
                assert tuple(found.shape) == coverage.matrix(layer, name)
                assert mask is None or not bool(found[~mask].any())
        for name in ("layer_types", "no_rope_layers"):
            if (types := getattr(config, name, None)) is not None:
                assert getattr(plain.config, name) == [types[layer] for layer in coverage.layers]
        if coverage.masks:
            continue
        factors = factors_for(coverage)
        save_adapter(coverage, factors, 2.0, str(block.path), tmp_path / "adapter")
        back = read_adapter(tmp_path / "adapter", coverage, "adapter")
        assert back.keys() == factors.keys()
        assert all(torch.allclose(back[key], factors[key] * (2.0 if key[-1] == "B" else 1.0)) for key in factors)
        adapted = plain_loss(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
        assert abs(float(adapted - plain_loss(AutoModelForCausalLM.from_pretrained(block.path)))) > 1e-4
        with merged(ours, coverage, factors, 2.0):
            torch.testing.assert_close(our_loss(ours), adapted, rtol=1e-5, atol=1e-5)


def test_what_a_part_of_the_answer_only_makes_up_for(tiny: Callable[[str], Path]) -> None:
    """Granite adds 0.22 of the MLP's answer: to give the dense layer's states from half the weights, double them."""
    model = load_model(tiny("granite"))
    layer = decoder_layers(model)[0]
    assert layout_of(model.config).added == pytest.approx(0.22)
    many = torch.randint(2, 122, (48, 40), generator=torch.Generator().manual_seed(0))
    stream = Stream.start(LayeredModel(tiny("granite")), many, "fp32")
    after = stream.fork()
    after.advance(0, layer)
    whole = layer.mlp.down_proj.weight.data.clone()
    layer.mlp.down_proj.weight.data *= 0.5
    fits: list[Regression] = []
    stream.end(0, layer, "mlp.down_proj", after.hidden, fits.append)
    found = refit(fits[0], layer.mlp.down_proj.weight.data, None)
    assert float((found - whole).norm() / whole.norm()) < 0.02


def test_the_table_in_the_docs_has_a_row_a_test_and_what_can_be_cut(tiny: Callable[[str], Path]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text()
    rows = re.findall(r"^\|[^|]+\|[^|]+\| `([\w-]+)` \|([^|]*)\|$", text, re.MULTILINE)
    names = {"layers": "layers", "kv_groups": "KV groups", "neurons": "neurons"}
    assert rows == [
        (family, f" {cut} " if cut else " ")
        for family in FAMILIES
        for fixed in [layout_of(load_config(tiny(family))).fixed]
        for cut in [", ".join(said for size, said in names.items() if size not in fixed)]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_part_of_a_multimodal_gemma_3(dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The same logits for text as the whole model gives, in the dtype that is stored."""
    from transformers import AutoConfig, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 261, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=260
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).to(dtype).save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "whole" / name).write_bytes((tiny("gemma3_text") / name).read_bytes())
    with pytest.raises(LegolmError, match=r"more than a text model; .*run: legolm import MODEL --out DIR"):
        load_config(tmp_path / "whole")
    import_model(str(tmp_path / "whole"), tmp_path / "text", Progress())
    assert load_config(tmp_path / "text").dtype == dtype
    assert load_tokenizer(tmp_path / "text").get_vocab() == load_tokenizer(tiny("gemma3_text")).get_vocab()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(found(TOKENS).logits, whole(TOKENS).logits)
    load_model(tmp_path / "text")
