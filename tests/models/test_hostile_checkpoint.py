"""Checkpoints that are broken, lie, or differ from their config: one line, in the dry run and in every command."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError
from legolm.models import (
    carry,
    count_parameters,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
)
from legolm.models.load import side_files

Change = Callable[[Path], None]
WEIGHTS = "model.safetensors"
IDS = torch.arange(2, 42)[None]


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "generation_config.json"])
def test_a_file_that_the_system_does_not_let_us_read_is_not_broken(model: Path, file: str) -> None:
    (model / file).unlink(missing_ok=True)
    (model / file).symlink_to("/proc/self/mem")  # a file that opens, and gives an error to who reads it, root too
    with pytest.raises(LegolmError, match=rf"^model: {model / file}: cannot be read \(Input/output error\); check its"):
        load_config(model)


def test_a_link_that_gets_another_name_is_seen(model: Path, tmp_path: Path) -> None:
    """As in the hub's cache: what the links lead to does not change."""
    links = tmp_path / "links"
    links.mkdir()
    for file in model.iterdir():
        (links / file.name).symlink_to(file)
    load_config(links)
    (links / WEIGHTS).rename(links / "weights.safetensors")
    with pytest.raises(LegolmError, match="holds no safetensors weights"):
        load_config(links)


def raw(header: Any, data: bytes = b"", size: int | None = None) -> Change:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = (len(content) if size is None else size).to_bytes(8, "little")
    return lambda path: (path / WEIGHTS).write_bytes(head + content + data) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, {"format": "pt"})

    return apply


def written(name: str, text: str) -> Change:
    return lambda path: (path / name).write_text(text) and None


def changed(file: str, **values: Any) -> Change:
    def apply(path: Path) -> None:
        found = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(found | values))

    return apply


def sharded(shards: dict[str, str], *files: str) -> Change:
    def apply(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        for file in files:
            save_file(dict(list(tensors.items())[1:]), path / file, {"format": "pt"})
        names = dict.fromkeys(tensors, "a.safetensors")
        (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names | shards}))

    return apply


def no_map(path: Path) -> None:
    (path / WEIGHTS).unlink()
    written(f"{WEIGHTS}.index.json", "{}")(path)


Q = "model.layers.1.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1]}}'
BROKEN: dict[str, tuple[Change, str]] = {
    "empty": (raw(b"", size=0), "model.safetensors: is broken"),
    "truncated": (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-5]) and None, "is broken"),
    "header beyond": (raw(b"{}", size=1000), "ends before its header does, after 2 of 1000 bytes"),
    "header of 100 MB": (raw(b"{}", size=100 << 20), "its header has 104857600 bytes; at most 16777216"),
    "overlap": (raw({"a": ONE, "b": ONE}, bytes(8)), "model.safetensors: is broken"),
    "out of range": (raw({"a": ONE | {"data_offsets": [8, 16]}}, bytes(8)), "model.safetensors: is broken"),
    "a shape that lies": (raw({"a": ONE | {"shape": [3]}}, bytes(8)), "model.safetensors: is broken"),
    "a huge shape": (raw({"a": ONE | {"shape": [10**30]}}, bytes(8)), "model.safetensors: is broken"),
    "no shape": (raw({"a": ONE | {"shape": "x" * 10}}, bytes(8)), "the shape of a is none"),
    "twice": (raw(TWICE, bytes(4)), "'a' is there twice"),
    "no object": (raw([]), "its header is no JSON object"),
    "missing": (weights(lambda t: [t.pop(Q), t.pop("model.norm.weight")]), f"{Q}, the first of 2 tensors, missing"),
    "foreign": (weights(lambda t: t.update(spy=torch.zeros(2))), "spy, foreign"),
    "another shape": (weights(lambda t: t.update({Q: t[Q][:8]})), f"{Q} is [8, 64] and should be [64, 64]"),
    "another kind": (weights(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"{Q} is I8, not F64, F32, F16, BF16"),
    "index outside": (sharded({"x": "../model/a.safetensors"}, "a.safetensors"), 'names "../model/a.safetensors"'),
    "index to nothing": (sharded({"x": "b.safetensors"}, "a.safetensors"), "names b.safetensors, and there is no such"),
    "a shard that lacks one": (sharded({}, "a.safetensors"), "a.safetensors: lacks"),
    "a tied head of its own": (
        weights(lambda t: t.update({HEAD: t[EMBEDDING] + 1})),
        f"has {HEAD} be {EMBEDDING} (tie_word_embeddings), and they are stored with different values",
    ),
    "in two shards": (sharded({"x": "b.safetensors"}, "a.safetensors", "b.safetensors"), "and so has a.safetensors"),
    "another config": (
        changed("config.json", configuration_files=["config.4.0.0.json"]),
        "names other configs (`configuration_files`); put the one that counts in its place",
    ),
    "no map": (no_map, "has no `weight_map`"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "holds no safetensors weights"),
    "config: not JSON": (written("config.json", "{"), "config.json: is not valid JSON"),
    "config: a list": (written("config.json", "[]"), "config.json: must be a JSON object, not list"),
    "config: deep": (written("config.json", "[" * 100_000), "config.json: is not valid JSON"),
    "config: no family": (changed("config.json", model_type=None), "has no `model_type`"),
    "config: unknown family": (changed("config.json", model_type="x" * 10**6), "is not known"),
    "config: hidden": (changed("config.json", hidden_size=10**12), "`hidden_size` = 1000000000000: must be a whole"),
    "config: negative": (changed("config.json", hidden_size=-1), "`hidden_size` = -1: must be"),
    "config: layers": (changed("config.json", num_hidden_layers=10**9), "`num_hidden_layers` = 1000000000: must be"),
    "config: text": (changed("config.json", vocab_size="many"), '`vocab_size` = "many": must be'),
    "config: heads": (changed("config.json", num_key_value_heads=3), "its 3 num_key_value_heads do not divide"),
    "config: more layers": (changed("config.json", num_hidden_layers=3), "9 tensors, missing"),
    "config: rope": (changed("config.json", rope_parameters={"rope_type": "yarn"}), "config.json"),
    "config: eps": (
        changed("config.json", rms_norm_eps=float("nan")),
        "`rms_norm_eps` = NaN: must be a number",
    ),
    "config: negative eps": (changed("config.json", rms_norm_eps=-1e-6), "`rms_norm_eps` = -1e-06: must be"),
    "config: theta": (changed("config.json", rope_theta=0), "`rope_theta` = 0: must be a number above 0"),
    "config: theta in rope": (
        changed("config.json", rope_parameters={"rope_type": "default", "rope_theta": float("inf")}),
        "`rope_parameters.rope_theta` = Infinity: must be a number above 0",
    ),
    "config: dropout": (changed("config.json", attention_dropout=float("nan")), "= NaN: must be a finite number"),
    "config: beyond floats": (changed("config.json", attention_dropout=10**400), "000: must be a finite number"),
    "generation": (written("generation_config.json", "{"), "generation_config.json: is not valid JSON"),
    "generation: list": (written("generation_config.json", "[1]"), "generation_config.json: must be a JSON object"),
    "generation: pad": (written("generation_config.json", '{"pad_token_id": -1}'), "generation_config.json: is no gen"),
    "an adapter beside": (written("adapter_config.json", "{}"), "has adapter_config.json beside the model"),
    "tokenizer: truncated": (written("tokenizer.json", '{"version": "1.0", "model"'), "has no readable tokenizer"),
    "tokenizer: list": (written("tokenizer.json", "[]"), "has no readable tokenizer"),
    "tokenizer: no eos": (changed("tokenizer_config.json", eos_token=None), "has no eos_token to end answers with"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_is_refused_in_one_line_before_weights_are_read(fault: str, model: Path) -> None:
    change, says = BROKEN[fault]
    change(model)
    began = time.process_time()
    with pytest.raises(LegolmError) as caught:
        load_config(model)
        load_tokenizer(model)
    said = str(caught.value)
    assert says in said
    assert str(model) in said or "config.json has" in said or "is not known" in said
    assert "\n" not in said
    assert len(said) < 800 + len(str(model))
    assert time.process_time() - began < 2


def test_the_tokenizer_of_another_model(model: Path) -> None:
    weights(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100]}))(model)
    changed("config.json", vocab_size=100, pad_token_id=None)(model)
    with pytest.raises(LegolmError, match=r"its tokenizer has 26\d tokens and the model rows for 100 \(vocab_size\)"):
        load_tokenizer(model)


def test_flags_of_sampling_without_sampling_can_be_saved(model: Path, tmp_path: Path) -> None:
    written("generation_config.json", '{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}')(model)
    found = load_model(model)
    save_model(found, load_tokenizer(model), tmp_path / "out", torch.float32)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 7
    assert not {"temperature", "top_p"} & {name for name, value in saved.items() if value is not None}


def test_code_of_a_checkpoint_is_never_run(model: Path, tmp_path: Path) -> None:
    for name in ("configuration_x.py", "tokenization_x.py"):
        (model / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "configuration_x.X"}
    changed("config.json", auto_map=own)(model)
    changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})(model)
    load_model(model), load_tokenizer(model)
    changed("config.json", model_type="x")(model)
    with pytest.raises(LegolmError, match="family 'x' is not known"):
        load_config(model)
    assert not (tmp_path / "ran").exists()


def test_what_transformers_passes_over_is_no_fault(variant: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny(variant), tmp_path / "model"))
    before = count_parameters(path)
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights(lambda t: t.update({rotary: torch.zeros(8)}))(path)
    load_config(path)
    assert count_parameters(path) == before + 8
    load_model(path)


def test_a_tied_head_may_be_stored_once_more(model: Path) -> None:
    before = load_model(model)(IDS).logits
    weights(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(model)
    assert torch.equal(load_model(model)(IDS).logits, before)


def test_only_the_files_that_are_read_count(model: Path) -> None:
    before = fingerprint(model), count_parameters(model)
    shutil.copy(model / WEIGHTS, model / "consolidated.safetensors")  # as Mistral ships its own format beside
    assert (fingerprint(model), count_parameters(model)) == before


@pytest.mark.parametrize("fault", ["truncated", "missing", "config: layers", "tokenizer: truncated"])
def test_every_command_says_so(fault: str, model: Path, tmp_path: Path) -> None:
    change, says = BROKEN[fault]
    change(model)
    rows = [{"instruction": f"Say {i}", "output": "ab"} for i in range(20)]
    (tmp_path / "fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": str(model), "data": str(tmp_path / "fr.jsonl"), "blocks": [{"name": "a", "method": "dense"}]}
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"clients": [{"id": "fr", "block": "a"}]}))
    out = tmp_path / "out"
    assert_one_line(legolm("run", tmp_path / "run.yaml", "--out", out, "--dry-run"), says)
    cut = ("--method", "magnitude", "--sparsity", "0.5")
    assert_one_line(legolm("prune", model, "--out", out, *cut), says)
    assert_one_line(legolm("eval", model, "--data", tmp_path / "fr.jsonl"), says)
    assert not out.exists()


def test_a_link_to_somebody_elses_file_is_not_copied(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Nor are those of a folder of links, and of the hub's cache, refused."""
    base, own = tmp_path / "base", tmp_path / "id_rsa"
    shutil.copytree(tiny("llama"), base)
    own.write_text("secret")
    (base / "LICENSE").symlink_to(own)
    for copies in (lambda: carry(base, tmp_path), lambda: side_files(base)):
        with pytest.raises(LegolmError, match=r"LICENSE: is a link out of its folder, to .*id_rsa; put the file there"):
            copies()
    (base / "LICENSE").unlink()
    (tmp_path / "LICENSE").write_text("terms")
    (base / "LICENSE").symlink_to(tmp_path / "LICENSE")
    assert base / "LICENSE" in side_files(base)
