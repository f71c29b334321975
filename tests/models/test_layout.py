"""What is read of a family and proved: the refusals by name, each check's fault, and the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from legolm.config import BlockConfig
from legolm.errors import LegolmError
from legolm.models import fingerprint, layout, layout_of, load_config, proof
from legolm.prune import cut_blocks
from legolm.system import Progress

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is proved yet; the cache's folder."""
    monkeypatch.setattr(layout, "_KNOWN", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "legolm" / "layouts"


def config_of(family: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(family, **(SIZES | settings))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    return config


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("mixtral", {}, "'mixtral' is a mixture of experts: "),
        ("qwen3_moe", {}, "'qwen3_moe' is a mixture of experts: "),
        ("mamba", {}, "'mamba' is a state-space or recurrent model: its layers carry a state"),
        ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "'falcon_h1' is a hybrid of att"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "'recurrent_gemma' is a hybrid of attention and state-space"),
        ("glm4", {}, r"'glm4' has mlp.gate_up_proj in its layers; it has no entry, and Llama's"),
        ("bloom", {"n_head": 4}, "'bloom' has no decoder layers at model.layers"),
    ],
)
def test_what_is_no_dense_llama_is_refused_by_name(family: str, settings: dict, says: str, tmp_path: Path) -> None:
    config_of(family, **settings).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LegolmError, match=says) as told:
        load_config(tmp_path)
    assert "only dense decoders" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_proof_that_fails_names_its_check(fresh: Path) -> None:
    says = r"family 'stablelm' is not proved: .* the check `packed equals one at a time` failed \("
    with pytest.raises(LegolmError, match=says):  # its attention passes nothing on
        layout_of(config_of("stablelm"))
    assert not fresh.exists()


def test_sizes_that_the_code_refuses_stay(fresh: Path) -> None:
    fixed = layout_of(config_of("diffllama")).fixed
    assert fixed.keys() == {"layers", "kv_groups"}
    assert "DiffLlama requires `num_key_value_heads` to be even" in fixed["kv_groups"]
    assert "self_attn.lambda_init of a layer goes by its place" in fixed["layers"]


def forget(name: str) -> Callable[..., dict[str, Any]]:
    """`sizes_in` that leaves a list of the config as it is."""
    return lambda *given: {key: value for key, value in layout.sizes_in(*given).items() if key != name}


@pytest.mark.parametrize(
    ("family", "settings", "lost", "check"),
    [
        ("granite", {"logits_scaling": 4.0}, "scale", "packed equals one at a time"),
        ("gemma2", {"final_logit_softcapping": 3.0}, "softcap", "packed equals one at a time"),
        ("gemma2", {"attn_logit_softcapping": 5.0}, "attention", "packed equals one at a time"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers", "cut, saved and loaded equals cut in memory"),
    ],
)
def test_what_ours_would_leave_out_is_found(
    family: str, settings: dict, lost: str, check: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, **settings)
    if lost in ("scale", "softcap"):
        of = proof.Head.of

        def without(model: Any, precision: Any) -> Any:
            head = of(model, precision)
            return type(head)(**(vars(head) | {lost: 1.0 if lost == "scale" else None}))

        monkeypatch.setattr(proof.Head, "of", without)
    elif lost == "attention":
        from legolm.models import packing

        real = packing.packed_attention
        monkeypatch.setattr(
            packing, "packed_attention", lambda *given, **named: real(*given, **named | {"softcap": None})
        )
    else:
        monkeypatch.setattr(proof, "sizes_in", forget(lost))
    with pytest.raises(LegolmError, match=f"the check `{check}` failed"):
        layout_of(config)


def test_a_layer_that_goes_by_its_place_stays(fresh: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    assert "layers" not in layout_of(model.config).fixed
    model.config.scale_attn_by_inverse_layer_idx = True
    model.save_pretrained(tmp_path / "scaled")
    spec = BlockConfig(name="b", method="structured", num_hidden_layers=1)
    with pytest.raises(LegolmError, match=r"'gpt2' keeps all 2, because attn\.scaling of a layer goes by its place"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "scaled" / name).write_bytes((tiny("gpt2") / name).read_bytes())
        cut_blocks(
            tmp_path / "scaled", fingerprint(tmp_path / "scaled"), [(spec, tmp_path / "b")], 0, "fp32", Progress()
        )


def test_a_config_is_proved_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of("llama"), torch.get_rng_state()
    found = layout_of(config)
    assert torch.equal(torch.get_rng_state(), state)
    (file,) = fresh.iterdir()
    assert json.loads(file.read_text()) == {"norms": {}, "added": 1.0, "fixed": {}, "query_norms": False}

    proofs: list[Any] = []
    monkeypatch.setattr(layout, "_prove", lambda small, places: proofs.append(small) or found)
    wider = config_of("llama", intermediate_size=112, num_hidden_layers=4)  # the same small copy
    for one in (config, wider):
        monkeypatch.setattr(layout, "_KNOWN", {})
        assert layout_of(one) == found
    assert not proofs
    for broken in ("", "{", '{"norms": {}, "added": "1", "fixed": {}}'):
        monkeypatch.setattr(layout, "_KNOWN", {})
        file.write_text(broken)
        assert layout_of(config) == found
    assert len(proofs) == 3
    layout_of(config_of("llama", attention_bias=True))
    assert len(proofs) == 4


def test_a_home_that_cannot_be_written_to_is_no_fault(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.parent.write_text("a file where the folder would be")
    assert layout_of(config_of("qwen3")).added == 1.0


def test_gpt2_as_the_hub_has_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Without `transformer.` before its names, with the buffers of old: the same block."""
    from safetensors.torch import load_file

    spec = BlockConfig(name="b", method="magnitude", sparsity=0.5)
    blocks = {}
    for kind in ("today", "hub"):
        folder = tmp_path / kind
        folder.mkdir()
        for file in tiny("gpt2").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if kind == "hub":
            tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"{kind}-block"
        cut_blocks(folder, "f", [(spec, out)], 0, "fp32", Progress())
        blocks[kind] = load_file(out / "model.safetensors")
    assert blocks["today"].keys() == blocks["hub"].keys()
    assert all(torch.equal(tensor, blocks["hub"][name]) for name, tensor in blocks["today"].items())
