"""PEFT's adapters as people have them: a model with one computes what it does under PEFT, or the adapter is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from legolm.adapter import merged, read_adapter
from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.models import shape_of

TEXT = torch.arange(1, 21)[None]
SMALL = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tiny: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)


def trained(base: Any, folder: Path, config: PeftConfig, **saved: object) -> torch.Tensor:
    """Save an adapter of PEFT's that has learned something; the logits of the model that learned it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
    if saved:
        model.save_pretrained(folder.parent / "start")
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        logits = model.eval()(TEXT).logits
    model.save_pretrained(folder, **saved)
    return logits


def pefts(base: Any, folder: Path, merge: bool = False) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        return (model.merge_and_unload() if merge else model)(TEXT).logits


def ours(base: Any, folder: Path) -> torch.Tensor:
    coverage = Coverage.full(shape_of(base.config))
    factors = read_adapter(folder, coverage, "lora.start")
    with torch.no_grad(), merged(base, coverage, factors, 1.0):
        return base(TEXT).logits


def assert_same(base: Any, folder: Path, learned: torch.Tensor) -> None:
    found = ours(base, folder)
    for wanted in (learned, pefts(base, folder), pefts(base, folder, merge=True)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - base(TEXT).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 48}},
        {"alpha_pattern": {r"model\.layers\.[01]\.self_attn\.(q|k)_proj": 48}},
        {"alpha_pattern": {"^model.layers.1.mlp.down_proj": 48, "down_proj": 2}},
        {"alpha_pattern": {"proj": 48, "q_pro": 24}},  # nothing
        {"rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"rank_pattern": {"down_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {".*mlp.*": 5}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": r".*\.1\.(self_attn|mlp)\.(v|gate)_proj"},
        {"target_modules": None},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_what_is_b_a_is_as_peft_computes_it(change: dict[str, Any], base: Any, tmp_path: Path) -> None:
    assert_same(base, tmp_path, trained(base, tmp_path, LoraConfig(**SMALL | change)))


def test_in_every_family_by_its_own_names(variant: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(variant), dtype=torch.float32)
    last = list(shape_of(model.config).modules)[-1]  # mlp.down_proj, dense_4h_to_h
    own = {f"layers.1.{last}": 2}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern=own, alpha_pattern={last: 12})
    assert_same(model, tmp_path, trained(model, tmp_path, config))
    usual = LoraConfig(r=4, lora_alpha=32)  # PEFT knows where for most
    with contextlib.suppress(ValueError):
        assert_same(model, tmp_path / "usual", trained(model, tmp_path / "usual", usual))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_converted_start_is_exact_and_another_refused(start: str, base: Any, tmp_path: Path) -> None:
    config = LoraConfig(**SMALL, init_lora_weights=start)
    with pytest.raises(LegolmError, match=f"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        trained(base, tmp_path / "raw", copy.deepcopy(config))
        ours(base, tmp_path / "raw")
    learned = trained(
        base, tmp_path / "adapter", config, path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert_same(base, tmp_path / "adapter", learned)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA scales each row"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True: B has a bias"),
        ({"trainable_token_indices": [1, 5]}, r"trainable_token_indices is \[1, 5\]"),
        ({"target_parameters": ["down_proj.weight"], "target_modules": ["q_proj"]}, "target_parameters is"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication is .*layers more than once"),
        ({"alora_invocation_tokens": [5, 6]}, "aLoRA changes tokens after these only"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.* is not a LoRA factor of a linear layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* is not a LoRA factor of a linear layer"),
    ],
    ids=str,
)
def test_what_is_more_than_b_a_is_refused(change: dict[str, Any], says: str, base: Any, tmp_path: Path) -> None:
    trained(base, tmp_path, LoraConfig(**SMALL | {"task_type": "CAUSAL_LM"} | change))
    with pytest.raises(LegolmError, match=rf"^lora\.start: .*{says}") as caught:
        ours(base, tmp_path)
    assert "\n" not in str(caught.value)


def said(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def named(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)

    return change


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, file)

    return change


def as_pickle(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (said(init_lora_weights="corda"), "init_lora_weights is 'corda', whose start changes the base"),
        (said(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga', whose start changes the base"),
        (said(init_lora_weights="loftq"), "init_lora_weights is 'loftq'.* quantizes them; merge it"),
        (said(init_lora_weights="tomorrow"), "init_lora_weights is 'tomorrow'"),
        (said(kasa_config={"svd": 1}), "kasa_config is .*KaSA"),
        (said(use_qalora=True), "use_qalora is True"),
        (said(tomorrow=0.5), "tomorrow is 0.5, a field not known here"),
        (said(peft_type="ADALORA"), "is ADALORA; only LoRA"),
        (said(r=8), r"has rank 4, and adapter_config\.json says 8"),
        (said(rank_pattern={"q_proj": 2}), r"q_proj has rank 4, and adapter_config\.json says 2"),
        (said(r=4.5), r"adapter_config\.json: r: Input should be a valid integer"),
        (said(target_modules=5), r"adapter_config\.json: target_modules"),
        (said(target_modules=["q_proj"]), r"has factors of model\.layers\.0\.mlp\.down_proj, where adapter_config"),
        (said(exclude_modules=["model.layers.1.self_attn.q_proj"]), r"has factors of model\.layers\.1\.self_attn"),
        (said(layers_to_transform=[0]), r"has factors of model\.layers\.1\.mlp\.down_proj, where adapter_config"),
        (said(target_modules=["q_proj", "down_proj", "up_proj"]), r"has no factors of model\.layers\.0\.mlp\.up_proj"),
        (said(target_modules=".*(q_proj"), r"adapter_config\.json .*is none: missing \)"),
        (said(alpha_pattern={"(q_proj": 2}), r"adapter_config\.json .*is none: missing \)"),
        (said(alpha_pattern={"(.*)*x": 2}), "repeats a group"),
        (said(target_modules="q_proj", layers_to_transform=[0]), "`layers_to_transform` cannot be used"),
        (without(".1."), r"has no factors of model\.layers\.1\.mlp\.down_proj, where"),
        (without("lora_B"), "has only one of lora_A and lora_B of"),
        (named("lora_A", "lora_A.default"), "is not a LoRA factor .* as PEFT names it"),
        (named("base_model.model.", ""), "is not a LoRA factor .* as PEFT names it"),
        (named("base_model.model.model.", "base_model.model.model.language_model."), "is not a LoRA factor"),
        (named("layers.1", "layers.2"), "is of another model, which has more than 2 layers"),
        (named("q_proj", "qkv_proj"), "is not a LoRA factor of a linear layer of 'llama'"),
        (as_pickle, r"has adapter_model\.bin, a pickle.*save_pretrained again"),
    ],
)
def test_what_peft_would_leave_out_or_not_load_is_refused(
    change: Callable[[Path], None], says: str, base: Any, tmp_path: Path
) -> None:
    trained(base, tmp_path, LoraConfig(**SMALL))
    ours(base, tmp_path)
    change(tmp_path)
    with pytest.raises(LegolmError, match=rf"^lora\.start: .*{says}") as caught:
        ours(base, tmp_path)
    assert "\n" not in str(caught.value)


def test_fields_of_the_training_alone_do_not_matter(base: Any, tmp_path: Path) -> None:
    learned = trained(base, tmp_path, LoraConfig(**SMALL))
    said(lora_dtype="auto", lorap_emb_lr=1e-6, loftq_config={"x": 1}, auto_mapping={"unsloth_fixed": True})(tmp_path)
    torch.testing.assert_close(ours(base, tmp_path), learned, rtol=1e-4, atol=1e-5)


NAMES = ("q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "proj", "0.*")
REGEXES = (r".*_proj", r"layers\.\d+\..*", r".*\.(0|1)\.mlp\..*", r"^model.*q_proj", r"mlp\.(up|down)_proj")
PATTERNS = st.sampled_from(NAMES + REGEXES)
MODULES = st.sampled_from(("q_proj", "v_proj", "down_proj", "mlp.up_proj", "layers.1.self_attn.k_proj"))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 5),
    alpha=st.integers(1, 20),
    ranks=st.dictionaries(PATTERNS, st.integers(1, 5), max_size=2),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 20), max_size=3),
    targets=st.lists(MODULES, min_size=1, max_size=4, unique=True) | st.sampled_from(REGEXES),
    layers=st.sampled_from((None, None, 0, [1], [0, 1])),
    excluded=st.none() | st.lists(PATTERNS, max_size=2),
    rslora=st.booleans(),
)
def test_patterns_mean_what_they_mean_to_peft(
    rank: int,
    alpha: int,
    ranks: dict[str, int],
    alphas: dict[str, int],
    targets: list[str] | str,
    layers: int | list[int] | None,
    excluded: list[str] | None,
    rslora: bool,
    base: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever PEFT has put a LoRA on, and at whatever rank and scale, the weights move by what PEFT says."""
    try:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=targets,
            layers_to_transform=layers,
            exclude_modules=excluded,
            use_rslora=rslora,
        )
        model = get_peft_model(copy.deepcopy(base), config)
    except ValueError:  # nothing is targeted, or layers with a pattern for modules
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.lora_B["default"].weight.data.normal_()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    factors = read_adapter(folder, Coverage.full(shape_of(base.config)), "lora.start")
    assert len(factors) == 2 * sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    for key in {key.rpartition(".")[0] for key in factors}:
        wanted = model.get_submodule(f"base_model.model.model.{key}").get_delta_weight("default")
        torch.testing.assert_close(factors[f"{key}.B"] @ factors[f"{key}.A"], wanted)
