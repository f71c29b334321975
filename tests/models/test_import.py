"""`legolm import`: quantized checkpoints become normal ones, each weight what its format says, to float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError
from legolm.export.llama_cpp import llama_cpp
from legolm.models import importing, load_config, load_model, load_tokenizer
from legolm.models.quantized import _groups, unpack

WEIGHTS = "model.safetensors"
Stored = dict[str, Tensor]
Made = tuple[Stored, Tensor]
"""What is stored of a matrix, by the end of its name, and what it stands for (float64)."""


def drawn(*shape: int, most: int, seed: int = 0) -> Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Rows of unsigned numbers as int32, bit by bit."""
    found = torch.zeros(len(numbers), numbers.shape[1] * bits // 32, dtype=torch.int64)
    for place in range(numbers.shape[1]):
        for bit in range(bits):
            at = place * bits + bit
            found[:, at // 32] |= (numbers[:, place].long() >> bit & 1) << at % 32
    return torch.where(found >= 1 << 31, found - (1 << 32), found).int()


def gptq(rows: int, columns: int, bits: int, order: bool, less: int) -> Made:
    numbers, zeros = drawn(columns, rows, most=1 << bits), drawn(columns // 32, rows, most=1 << bits, seed=1)
    scales = torch.rand(columns // 32, rows).half() / 100
    group = torch.arange(columns, dtype=torch.int32) // 32
    if order:
        group = group[torch.randperm(columns)]
    kept = pack((zeros - less) & ((1 << bits) - 1), bits)
    stored = {"qweight": pack(numbers.T, bits).T, "qzeros": kept, "scales": scales, "g_idx": group}
    return stored, ((numbers - zeros[group]).double() * scales.double()[group]).T


def unordered(rows: int, columns: int) -> Made:
    stored, whole = gptq(rows, columns, 4, False, 1)
    return stored | {"g_idx": torch.full_like(stored["g_idx"], -1)}, whole


def awq(rows: int, columns: int) -> Made:
    numbers, zeros = drawn(columns, rows, most=16), drawn(columns // 32, rows, most=16, seed=1)
    scales = torch.rand(columns // 32, rows).half() / 100
    # Of each eight, the kernels find them in this order.
    mixed = [one.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1) for one in (numbers, zeros)]
    stored = {"qweight": pack(mixed[0], 4), "qzeros": pack(mixed[1], 4), "scales": scales}
    return stored, ((numbers - zeros.repeat_interleave(32, 0)).double() * scales.double().repeat_interleave(32, 0)).T


def fp8(rows: int, columns: int, scale: Tensor, name: str, block: int = 24) -> Made:
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    whole = weight.double()
    if scale.dim() == 2 and scale.shape[1] > 1:  # blocks of so many x 40: the last ones are smaller
        for i in range(rows):
            for j in range(columns):
                whole[i, j] *= scale[i // block, j // 40].double()
    else:
        whole *= scale.double()
    return {"weight": weight, name: scale, "input_scale": torch.tensor(1.0)}, whole


def bnb4(rows: int, columns: int, nested: int | None) -> Made:
    """`nested`: how many blocks' sizes one block of sizes has."""
    codes, table = drawn(rows * columns, most=16), torch.linspace(-1, 1, 16)
    blocks = rows * columns // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, columns]}
    largest = torch.rand(blocks) / 10
    extra = {"weight.absmax": largest}
    if nested:
        small = drawn(blocks, most=256, seed=2)
        scales = {"weight.nested_absmax": torch.rand(-(-blocks // nested)), "weight.nested_quant_map": torch.rand(256)}
        extra = {"weight.absmax": small.to(torch.uint8), **scales}
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.03}
        of = scales["weight.nested_absmax"].double()[torch.arange(blocks) // nested]
        largest = scales["weight.nested_quant_map"].double()[small] * of + 0.03
    whole = table.double()[codes] * largest.double().repeat_interleave(64)
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored = {"weight": packed, "weight.quant_map": table, "weight.quant_state.bitsandbytes__nf4": told}
    return stored | extra, whole.view(rows, columns)


def bnb8(rows: int, columns: int) -> Made:
    weight, largest = (drawn(rows, columns, most=255) - 127).to(torch.int8), torch.rand(rows)
    stored = {"weight": weight, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, weight.double() * largest.double()[:, None] / 127


def packed(rows: int, columns: int, order: str = "") -> Made:
    """`order`: which columns are of a group is "any", or the file has a place for it that says nothing, "unsaid"."""
    numbers, scale = drawn(rows, columns, most=16), torch.rand(rows, columns // 32).bfloat16()
    group = torch.arange(columns, dtype=torch.int32) // 32
    group = group[torch.randperm(columns)] if order == "any" else group
    stored = {"weight_packed": pack(numbers, 4), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    stored |= {"weight_g_idx": group if order == "any" else torch.full_like(group, -1)} if order else {}
    return stored, (numbers - 8).double() * scale.double()[:, group]


def test_groups_are_as_large_as_the_file_says() -> None:
    """The last one may be smaller; without a size they are as many in each."""
    assert torch.bincount(_groups(100, 4, 32)).tolist() == [32, 32, 32, 4]
    assert torch.bincount(_groups(96, 3, -1)).tolist() == torch.bincount(_groups(96, 3, None)).tolist() == [32] * 3
    with pytest.raises(LegolmError, match="group_size is 64, and 100 columns have 4 scales"):
        _groups(100, 4, 64)


INTS = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}, "format": "pack-quantized"}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[int, int], Made]]] = {
    "gptq 4": ({"quant_method": "gptq", "bits": 4}, lambda r, c: gptq(r, c, 4, False, 1)),
    "gptq 8 act order": ({"quant_method": "gptq", "bits": 8}, lambda r, c: gptq(r, c, 8, True, 1)),
    "gptq no order": ({"quant_method": "gptq", "bits": 4}, unordered),
    "gptq 3": ({"quant_method": "gptq", "bits": 3}, lambda r, c: gptq(r, c, 3, False, 1)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
        lambda r, c: gptq(r, c, 2, False, 0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 40]},
        lambda r, c: fp8(r, c, torch.rand(-(-r // 24), -(-c // 40)), "weight_scale_inv"),
    ),
    "fp8 tensor": ({"quant_method": "fp8"}, lambda r, c: fp8(r, c, torch.tensor(0.3), "weight_scale")),
    "fp8 rows": ({"quant_method": "fbgemm_fp8"}, lambda r, c: fp8(r, c, torch.rand(r, 1), "weight_scale")),
    "compressed fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        lambda r, c: fp8(r, c, torch.rand(r, 1).bfloat16(), "weight_scale"),
    ),
    # A block larger than any matrix, which need not be as large in memory.
    "fp8 one block": (
        {"quant_method": "fp8", "weight_block_size": [10**12, 40]},
        lambda r, c: fp8(r, c, torch.rand(1, -(-c // 40)), "weight_scale_inv", 10**12),
    ),
    "compressed int4": ({"quant_method": "compressed-tensors", **INTS}, packed),
    "compressed act order": ({"quant_method": "compressed-tensors", **INTS}, lambda r, c: packed(r, c, "any")),
    "compressed no order": ({"quant_method": "compressed-tensors", **INTS}, lambda r, c: packed(r, c, "unsaid")),
    "bitsandbytes nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda r, c: bnb4(r, c, None)),
    "bitsandbytes nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda r, c: bnb4(r, c, 16)),
    "bitsandbytes one block": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda r, c: bnb4(r, c, 10**12),
    ),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
}


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def quantize(model: Path, settings: dict[str, Any], make: Callable[[int, int], Made]) -> Stored:
    """The checkpoint with every linear weight of its layers in a format; what they stand for."""
    torch.manual_seed(0)
    tensors, whole = load_file(model / WEIGHTS), {}
    for name in [name for name in tensors if "proj.weight" in name]:
        parts, whole[name] = make(*tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": settings, "auto_map": {"x": "y.X"}}))
    return whole | {name: tensor.double() for name, tensor in tensors.items() if name in load_names(model)}


def load_names(model: Path) -> set[str]:
    return {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_format_says(name: str, model: Path, tmp_path: Path) -> None:
    wanted = quantize(model, *FORMATS[name])
    (model / "LICENSE").write_text("terms")
    done = legolm("import", model, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / WEIGHTS)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-6, atol=1e-7)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}  # that of the model
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & raw.keys()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert bool(load_model(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all())


@pytest.mark.parametrize("name", ["awq", "gptq 4", "bitsandbytes nf4", "gguf"])
def test_room_is_looked_for_for_all_that_will_be_written(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(importing, "check_room", lambda out, needed: asked.append(needed))
    if name == "gguf":
        write_gguf(model, tmp_path / "x.gguf", KINDS.Q4_0, {"rope_freqs.weight": torch.ones(8)})
    else:
        quantize(model, *FORMATS[name])
    assert legolm("import", tmp_path / "x.gguf" if name == "gguf" else model, "--out", tmp_path / "out").returncode == 0
    assert asked[-1:] == [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / WEIGHTS).values())]


def test_unpacking_is_packing_turned_round() -> None:
    for bits in (2, 3, 4, 8):
        numbers = drawn(5, 96, most=1 << bits)
        assert torch.equal(unpack(pack(numbers, bits), bits, 1), numbers)
        assert torch.equal(unpack(pack(numbers, bits).T, bits, 0), numbers.T)


def test_a_quantized_model_is_refused_with_the_way_out(model: Path, tmp_path: Path) -> None:
    cut = ("--out", tmp_path / "block", "--method", "magnitude", "--sparsity", "0.5")
    (model / "quantize_config.json").write_text('{"bits": 4}')  # of AutoGPTQ: config.json says nothing
    assert_one_line(legolm("prune", model, *cut), "quantized", "legolm import MODEL --out DIR")
    (model / "quantize_config.json").unlink()
    quantize(model, *FORMATS["awq"])
    assert_one_line(legolm("prune", model, *cut), "quantized (awq)", "legolm import MODEL --out DIR")
    run = {"model": str(model), "data": "starter", "blocks": [{"name": "a", "method": "dense"}]}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"clients": [{"id": "sst2", "block": "a"}]}))
    assert_one_line(legolm("run", tmp_path / "run.yaml", "--dry-run"), "legolm import MODEL --out DIR")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert_one_line(legolm("prune", tmp_path / "x.gguf", *cut), f"legolm import {tmp_path}/x.gguf --out DIR")


def remove(end: str) -> Callable[[Stored], None]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(end)] and None


BROKEN: dict[str, tuple[str, Callable[[Stored], None], dict[str, Any], str]] = {
    "no zeros": ("gptq 4", remove("0.mlp.up_proj.qzeros"), {}, "layers.0.mlp.up_proj cannot be dequantized (it has no"),
    "no layer": ("awq", remove("1.norm.weight"), {"num_hidden_layers": 3}, "missing"),
    "no scale": ("fp8 tensor", remove("q_proj.weight_scale"), {}, "q_proj.weight is F8_E4M3 and has no scale"),
    "groups": (
        "gptq 4",
        lambda t: t.update({name: one + 9 for name, one in t.items() if "g_idx" in name}),
        {},
        "g_idx names groups that are not there",
    ),
    "compressed groups": (
        "compressed act order",
        lambda t: t.update({name: one + 9 for name, one in t.items() if "g_idx" in name}),
        {},
        "g_idx names groups that are not there",
    ),
    "compressed shape": (
        "compressed int4",
        lambda t: t.update({name: one * 10**11 for name, one in t.items() if "weight_shape" in name}),
        {},
        "weight_shape is [6400000000000, 9600000000000], and [64, 96] numbers are packed",
    ),
    "another shape": (
        "compressed int4",
        remove("-"),
        {"intermediate_size": 128},
        "is [64, 96] and should be [64, 128]",
    ),
    "format": ("awq", remove("-"), {"quantization_config": {"quant_method": "aqlm"}}, "(aqlm), which cannot be undone"),
    "marlin": (
        "gptq 4",
        remove("-"),
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
        "(gptq, marlin), which cannot be undone here; load it with the library that made it",
    ),
    "blocks": (
        "fp8 blocks",
        lambda t: t.update({name: one[:1] for name, one in t.items() if "up_proj.weight_scale_inv" in name}),
        {},
        "does not fit its shape [96, 64]",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(fault: str, model: Path, tmp_path: Path) -> None:
    name, change, config, says = BROKEN[fault]
    quantize(model, *FORMATS[name])
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | config))
    assert_one_line(legolm("import", model, "--out", tmp_path / "out"), str(model), says)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_not_quantized_is_taken_as_it_is(model: Path, tmp_path: Path) -> None:
    assert_one_line(legolm("import", model, "--out", tmp_path / "out"), "is not quantized; give it as it is")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized, and more than a text model"),
        (
            {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**9}},
            "`num_hidden_layers` = 1000000000",
        ),
        ({"model_type": "clip", "text_config": {}}, "'clip' has no text model of its own inside"),
    ],
)
def test_a_multimodal_model_without_a_text_part_to_take_is_refused(
    change: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    whole = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
    (model / "config.json").write_text(json.dumps(whole | change))
    assert_one_line(legolm("import", model, "--out", tmp_path / "out"), says)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def write_gguf(model: Path, path: Path, kind: gguf.GGMLQuantizationType, extra: dict[str, Tensor], **more: Any) -> None:
    """The checkpoint as llama.cpp's converter writes it: other names, and queries and keys in its own order."""
    config, tensors = load_config(model), load_file(model / WEIGHTS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_pre(more.pop("pre", "gpt-2"))
    for name, value in more.items():
        key = name.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    tokenizer = load_tokenizer(model)
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    words[words.index("ÿ")] = "zq"  # of a byte that no text has: a merge has to be there
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in {**tensors, **extra}.items():
        for end, heads in (("q_proj.weight", 4), ("k_proj.weight", 2)):
            if name.endswith(end):
                halves = tensor.view(heads, 2, -1, 64)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        new = names.get_name(name, try_suffixes=(".weight",)) or name
        plain = tensor.dim() == 1 or kind == gguf.GGMLQuantizationType.F32
        values = tensor.numpy().astype(np.float32)
        if plain:
            writer.add_tensor(new, values)
        else:
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(("kind", "dtype", "off"), [(KINDS.F32, "float32", 0), (KINDS.Q8_0, "bfloat16", 0.01)])
def test_a_gguf_file_is_the_model_that_it_was_made_of(
    kind: gguf.GGMLQuantizationType, dtype: str, off: float, model: Path, tmp_path: Path
) -> None:
    write_gguf(model, tmp_path / "x.gguf", kind, {"rope_freqs.weight": torch.ones(8)})
    done = legolm("import", tmp_path / "x.gguf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "out").dtype == getattr(torch, dtype)
    before, after = load_model(model).state_dict(), load_model(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert float((after[name] - tensor).abs().max()) <= off * float(tensor.abs().max()), name
    old, new = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    chat = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "ab"}]
    assert new.apply_chat_template(chat)["input_ids"] == old.apply_chat_template(chat)["input_ids"]


@pytest.mark.parametrize(("pre", "begins"), [("gpt-2", False), ("llama-bpe", True), ("tekken", True)])
def test_texts_begin_as_in_llama_cpp_where_a_gguf_does_not_say(
    pre: str, begins: bool, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    write_gguf(model, tmp_path / "x.gguf", KINDS.F32, {}, pre=pre)
    assert legolm("import", tmp_path / "x.gguf", "--out", tmp_path / "out").returncode == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    with llama_cpp(tmp_path / "x.gguf", 64) as runtime:
        assert runtime.tokenize("ab", special=True) == tokenizer.encode("ab")
    assert (tokenizer.encode("ab")[0] == tokenizer.bos_token_id) == begins


def test_what_transformers_would_pass_over_of_a_gguf_is_not(model: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": load_config(model).rope_parameters["rope_theta"]}
    scaled = LlamaConfig(head_dim=16, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    factors = rope["rope_theta"] ** -(torch.arange(0, 16, 2) / 16) / frequencies
    assert factors.max() == pytest.approx(8)
    write_gguf(model, tmp_path / "x.gguf", KINDS.F32, {"rope_freqs.weight": factors})
    assert legolm("import", tmp_path / "x.gguf", "--out", tmp_path / "out").returncode == 0
    found = load_model(tmp_path / "out").model.rotary_emb.inv_freq
    torch.testing.assert_close(found, frequencies)
    for extra, more, says in (
        ({"rope_freqs.weight": factors * 1.1}, {}, "transformers has no place for rope_freqs.weight"),
        ({"blk.0.ffn_gate_inp.weight": torch.ones(4)}, {}, "transformers has no place for blk.0.ffn_gate_inp.weight"),
        ({}, {"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type (yarn)"),
        ({}, {"llama__attention__sliding_window": 8}, "has no place for llama.attention.sliding_window (8)"),
        ({}, {"llama__attention__value_length": 8}, "has no place for llama.attention.value_length (8)"),
        ({}, {"llama__expert_count": 8}, "has no place for llama.expert_count (8)"),
        ({}, {"pre": "default"}, "its pre-tokenizer (default)"),  # which would be taken for GPT-2's
    ):
        write_gguf(model, tmp_path / "y.gguf", KINDS.F32, extra, **more)
        assert_one_line(legolm("import", tmp_path / "y.gguf", "--out", tmp_path / "no"), says)
    (tmp_path / "z.gguf").write_bytes(b"GGUF")
    assert_one_line(legolm("import", tmp_path / "z.gguf", "--out", tmp_path / "no"), "transformers cannot read it")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 3_000_000, "`num_hidden_layers` = 3000000: must be a whole number from 1 to 1024"),
        ("block_count", 3, "its settings and its tensors differ: model.layers.2.input_layernorm.weight"),
        ("embedding_length", 2_000_000_000, "`hidden_size` = 2000000000"),
        ("feed_forward_length", 128, "mlp.down_proj.weight is [64, 96] and should be [64, 128]"),
        ("vocab_size", 4_000_000_000, "`vocab_size` = 4000000000"),
        ("attention.key_length", 4_000_000_000, "`head_dim` = 4000000000"),
        ("attention.head_count", 0, "`num_attention_heads` = 0"),
    ],
)
def test_sizes_that_are_not_those_of_a_ggufs_tensors_are_refused_before_any_is_read(
    key: str, value: int, says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {f"llama__{key.replace('.', '__')}": value} if key in ("vocab_size", "attention.key_length") else {}
    write_gguf(model, tmp_path / "x.gguf", KINDS.F32, {}, **absent)
    reader = gguf.GGUFReader(tmp_path / "x.gguf", "r+")
    reader.fields[f"llama.{key}"].parts[-1][0] = value
    reader.data.flush()
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("a tensor was read"))
    done = legolm("import", tmp_path / "x.gguf", "--out", tmp_path / "out")
    assert_one_line(done, f"model: {tmp_path / 'x.gguf'}: ", says)
    assert not (tmp_path / "out").exists()


def test_gguf_files_are_found_by_their_end_in_any_case_and_missing_ones_are_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    write_gguf(model, tmp_path / "up" / "X.GGUF", KINDS.F32, {})
    for given, out in ((tmp_path / "up" / "X.GGUF", "a"), (tmp_path / "up", "b")):
        assert legolm("import", given, "--out", tmp_path / out).returncode == 0
        cut = ("--out", tmp_path / "block", "--method", "magnitude", "--sparsity", "0.5")
        assert_one_line(legolm("prune", given, *cut), f"is a GGUF file; run: legolm import {given} --out DIR")
    for name in ("no.gguf", "no.GGUF", "no/no.gguf"):
        assert_one_line(legolm("import", name, "--out", tmp_path / "c"), f"model: no file {name}; give a GGUF file")
