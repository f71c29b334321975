"""`legolm eval` as users meet it: blocks beside their LLM, adapters, JSON, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from legolm.adapter import init_factors, merge, save_adapter, slice_factors
from legolm.block import read_block
from legolm.cli import main
from legolm.evaluation import line_up
from legolm.evaluation.side_by_side import Subject, load_subject
from legolm.models import decoder_layers, fingerprint, load_model

Answer = tuple[int, str, str]


def legolm(*arguments: object) -> Answer:
    """Exit code, output and errors of the command's entry point, in this process."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    argv = patch.object(sys, "argv", ["legolm", *map(str, arguments)])
    with redirect_stdout(out), redirect_stderr(errors), argv:
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def blocks(tiny: Callable[[str], Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A structured and an unstructured block of the tiny Llama."""
    folder = tmp_path_factory.mktemp("blocks")
    text = ("--calibration", corpus, "--samples", 4, "--length", 64)
    for name, target in (("structured", ("--intermediate-size", 64)), ("wanda", ("--sparsity", 0.5))):
        code, _, errors = legolm("prune", tiny("llama"), "--out", folder / name, "--method", name, *target, *text)
        assert code == 0, errors
    return {name: folder / name for name in ("structured", "wanda")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Say {i}", "output": "ab" * (i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def adapter(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A PEFT adapter whose B is not zero, for every model with the tiny Llama's attention."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(tiny("llama")), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_block_beside_its_llm(
    blocks: dict[str, Path],
    tiny: Callable[[str], Path],
    tasks: Callable[..., Path],
    data: Path,
    corpus: Path,
    tmp_path: Path,
) -> None:
    given = (
        "--tasks",
        "three",
        "--include",
        tasks(),
        "--data",
        data,
        "--text",
        corpus,
        "--length",
        128,
        "--windows",
        5,
    )
    out = tmp_path / "new" / "scores.json"
    code, shown, errors = legolm(
        "eval", *blocks.values(), "--base", tiny("llama"), *given, "--rouge", "--limit", 3, "--out", out
    )
    assert code == 0, errors
    content = json.loads(out.read_text())
    assert (content["precision"], content["limit"], content["length"]) == ("fp32", 3, 128)
    assert {"lm_eval", "torch"} <= set(content["versions"])
    results = content["results"]
    names = [str(tiny("llama")), str(blocks["structured"]), str(blocks["wanda"])]
    figures = {(one["task"], one["metric"]): {} for one in results}
    for one in results:
        figures[one["task"], one["metric"]][one["model"]] = one
    # A multiple-choice task that names no metrics has both accuracies.
    assert list(figures) == [
        ("three", "acc"),
        ("three", "acc_norm"),
        ("answers", "answer loss"),
        ("answers", "exact match"),
        ("answers", "ROUGE-L"),
        ("text", "perplexity"),
    ]
    for (task, metric), rows in figures.items():
        assert list(rows) == names
        llm, *cut = rows.values()
        assert llm["against"] is None
        for one in rows.values():
            assert one["count"] == len(one["sums"]) == (5 if task == "text" else 3)
        for block in cut:
            assert block["against"]["model"] == names[0]
            assert block["against"]["difference"] == pytest.approx(block["value"] - llm["value"])
            assert 0 < block["against"]["p"] <= 1
            lossy = metric in ("answer loss", "ROUGE-L", "perplexity")
            assert block["against"]["test"] == ("McNemar" if not lossy or set(block["sums"]) == {0.0} else "sign flips")
    loss = figures["answers", "answer loss"][names[0]]
    assert loss["value"] == pytest.approx(sum(loss["sums"]) / sum(loss["weights"]))
    for word in ("answer loss", "ROUGE-L", "perplexity", "structured", "wanda", "±", str(out)):
        assert word in shown


def constant(tiny: Path, tokenizer: Any, text: str, folder: Path) -> Path:
    """A copy of a model that answers everything with `text`: what a token is followed by is in its embedding alone."""
    model = load_model(tiny)
    sequence = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    last = tokenizer.encode("\n", add_special_tokens=False)[0]  # the prompt's
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.config.tie_word_embeddings = False
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.nn.functional.one_hot(torch.arange(len(embedding)) % 64, 64).float())
        head = torch.nn.Linear(64, len(embedding), bias=False)
        head.weight.zero_()
        for before, after in zip([last, *sequence], sequence, strict=False):
            head.weight[after] += 4.0 * embedding[before]
        model.lm_head = head
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_sizes_and_what_a_blind_guess_would_have(
    tiny: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    same, out = constant(tiny("llama"), tokenizer, "no", tmp_path / "same"), tmp_path / "found.json"
    rows = [{"instruction": f"Is {i} even?\x1b[31m", "output": ("no", "no", "yes")[i % 3]} for i in range(6)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown, errors = legolm("eval", tiny("llama"), same, "--data", tmp_path / "labels.jsonl", "--out", out)
    assert code == 0, errors
    found = json.loads(out.read_text())
    assert [one["wanted"] for one in found["answers"]] == ["no", "yes", "no"] or len(found["answers"]) == 3
    assert {one["answers"][str(same)] for one in found["answers"]} == {"no"}
    assert "✓ same" in shown and "\x1b" not in shown and "Is 0 even? [31m" in shown
    sizes = {one["model"]: one for one in found["models"]}
    assert sizes[str(same)]["parameters"] == sum(one.numel() for one in load_model(same).parameters())
    assert all(one["tokens_per_s"] > 0 and one["bytes"] > 1000 for one in sizes.values())
    # Two of three answers are `no`: 6 · 0.6365 nats over 4 · 3 + 2 · 4 tokens, each letter one and the end.
    said = " ".join(found["warnings"])
    assert f"exact match is 0: no answer of {tiny('llama')} is right" in said
    assert f"{same}: its exact match 0.667 does not beat the label prior's 0.667" in said
    assert f"does not beat the label prior's {6 * 0.6365 / 20:.3f}" in said
    assert all(f"warning: {one}" in shown for one in found["warnings"])
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith(("warning", str(out))))


def test_answers_that_differ_all_have_no_label_prior(tiny: Callable[[str], Path], data: Path) -> None:
    code, shown, errors = legolm("eval", tiny("llama"), "--data", data)
    assert code == 0, errors
    assert "exact match is 0" in shown and "label prior" not in shown


def test_a_full_disk_is_one_line_before_the_work(tiny: Callable[[str], Path], data: Path, full_disk: Path) -> None:
    code, _, errors = legolm("eval", tiny("llama"), "--data", data, "--out", full_disk / "e.json")
    assert code == 2 and errors.splitlines() == [
        f"error: {full_disk / 'e.json'}: the disk is full; free some space or give another --out"
    ]
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


def test_chats_and_pairs_are_the_same_questions(tiny: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    roles = (("user", "instruction"), ("assistant", "output"))
    chats = [{"chat": [{"role": role, "content": row[field]} for role, field in roles]} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    given = ((data,), (tmp_path / "chats.jsonl", "--messages", "chat"))
    found = [legolm("eval", tiny("llama"), "--data", *arguments) for arguments in given]
    figures = [(code, shown.partition("Size")[0], shown.partition("Answers")[2]) for code, shown, _ in found]
    assert figures[0] == figures[1]  # all but the speed
    assert figures[0][0] == 0


def test_who_stands_beside_whom(
    blocks: dict[str, Path], tiny: Callable[[str], Path], adapter: Path, data: Path
) -> None:
    llm, other, block = str(tiny("llama")), str(tiny("qwen3")), str(blocks["wanda"])

    def stand(*models: str, **options: Any) -> list[tuple[str, str | None]]:
        return [(subject.name, subject.against) for subject in line_up(models, **options)]

    assert stand(llm) == [(llm, None)]
    assert stand(other, llm, other) == [(other, None), (llm, other)]
    assert stand(block, base=llm) == [(llm, None), (block, llm)]
    # The LLM is found among the models.
    assert stand(block, other, llm) == [(llm, None), (block, llm), (other, llm)]
    assert stand(llm, adapter=adapter) == [(llm, None), (f"{llm} + adapter", llm)]
    assert stand(block, base=llm, adapter=adapter) == [(llm, None), (f"{block} + adapter", llm)]
    assert line_up([block], base=llm)[1].block is not None


def test_an_adapter_on_the_llm_and_under_a_blocks_mask(
    blocks: dict[str, Path], tiny: Callable[[str], Path], adapter: Path, data: Path
) -> None:
    code, shown, errors = legolm("eval", tiny("llama"), "--adapter", adapter, "--data", data)
    assert code == 0, errors
    rows = [line.split() for line in shown.splitlines() if line.startswith("answer loss")]
    assert len(rows) == 2 and rows[0][3] != rows[1][5]
    block = read_block(blocks["wanda"])
    with_adapter = load_subject(Subject("a", block.path, block, adapter))
    weight = decoder_layers(with_adapter)[0].get_submodule("self_attn.q_proj").weight
    mask = block.coverage.mask(0, "self_attn.q_proj")
    assert mask is not None
    before = decoder_layers(load_model(block.path))[0].get_submodule("self_attn.q_proj").weight
    assert torch.equal(weight != 0, mask)
    assert not torch.equal(weight, before)


def test_an_adapter_of_a_run_on_its_block(blocks: dict[str, Path], tmp_path: Path) -> None:
    block = read_block(blocks["structured"])
    whole = init_factors(block.coverage.shape, ["q_proj", "down_proj"], 2, seed=0)
    factors = slice_factors(block.coverage, whole, 2)
    factors = {key: torch.full_like(tensor, 0.1) if key.endswith("B") else tensor for key, tensor in factors.items()}
    save_adapter(block.coverage, factors, 2.0, str(block.path), tmp_path / "own")
    ids = torch.arange(20)[None]
    loaded = load_subject(Subject("a", block.path, block, tmp_path / "own"))
    expected = load_model(block.path)
    merge(expected, block.coverage, factors, 2.0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_line(
    blocks: dict[str, Path],
    tiny: Callable[[str], Path],
    tasks: Callable[..., Path],
    adapter: Path,
    data: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, block = tiny("llama"), blocks["structured"]

    def fails(*arguments: object, says: tuple[str, ...]) -> None:
        code, _, errors = legolm("eval", *arguments)
        assert code == 2, errors
        lines = [line for line in errors.splitlines() if line.strip()]
        assert len(lines) == 1, errors
        for part in ("error: ", *says):
            assert part in lines[0]

    short = fingerprint(llm)[:12]
    fails(llm, says=("nothing to evaluate on",))
    fails(llm, "--tasks", " , ", "--data", data, says=("--tasks ' , ': names none",))
    fails(llm, "--data", "", says=("--data",))
    fails(block, "--data", data, "--base", tiny("qwen3"), says=(short, fingerprint(tiny("qwen3"))[:12], "--base"))
    moved = tmp_path / "moved"  # to where its LLM is not
    shutil.copytree(block, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["details"]["model"] = "/nowhere"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    fails(moved, tiny("qwen3"), "--data", data, says=(short, "name its LLM with --base MODEL"))
    # That of a name which is not known, `test_tasks` holds: the harness reads its 14,000 files for it.
    fails(llm, "--tasks", "three", "--include", tasks(doc_to_text=None), says=("three.yaml: no field `doc_to_text`",))
    fails(llm, "--include", tasks(), "--data", data, says=("--include", "--tasks"))
    for option, wants in (("--limit", "--tasks or --data"), ("--answer", "--data")):
        fails(llm, "--text", corpus, option, 3, says=(option, f"only with {wants}"))
    fails(llm, "--data", data, "--messages", "chat", "--answer", "a", says=("instead of --instruction and its like",))
    fails(llm, "--data", data, "--messages", "chat", says=("`chat`", "instruction, output"))
    for option in ("--length", "--windows"):
        fails(llm, "--data", data, option, 3, says=(option, "only with --text"))
    # Before the tasks have their hours.
    asked = ("--tasks", "three", "--include", tasks(), "--text", corpus, "--length")
    with monkeypatch.context() as patched:
        patched.setattr("legolm.evaluation.questions.run_tasks", None)
        fails(llm, *asked, 10**6, says=("--length 1000000: the model takes 512 tokens",))
    long = tmp_path / "long.jsonl"
    long.write_text(data.read_text() + json.dumps({"instruction": "a" * 600, "output": "b"}) + "\n")
    number = len(long.read_text().splitlines())
    fails(llm, "--data", long, says=(f"--data: conversation {number} has more than the 512 tokens",))
    learned = tmp_path / "learned"
    shutil.copytree(llm, learned)
    shutil.copytree(adapter, learned / "adapter")
    beside = line_up([str(learned)], adapter=learned / "adapter")  # a plain model that has an adapter in its folder
    assert len(beside) == 2
    save_file({}, learned / "factors.safetensors")  # a folder of final/: they are merged
    fails(learned, "--adapter", learned / "adapter", "--data", data, says=("is merged into", "already"))
    weights = load_file(learned / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file(weights | {name: weights[name] * math.nan}, learned / "model.safetensors", {"format": "pt"})
    fails(learned, "--data", data, says=("learned", f"{name} is not finite"))
    fails(llm, "--text", corpus, "--rouge", says=("--rouge", "--data"))
    fails(llm, "--data", tmp_path / "none.jsonl", says=("--data", "none.jsonl"))
    fails(llm, "--data", data, "--out", data, says=("--out", "is already there"))
    short_text = tmp_path / "short.txt"
    short_text.write_text("a few words")
    fails(llm, "--text", short_text, "--length", 64, says=("a window needs 64",))
    fails(tmp_path, "--data", data, says=("has no config.json",))
    fails(llm, block, "--adapter", adapter, "--data", data, says=("goes on one model, not on 2",))
    fails(llm, "--adapter", tmp_path, "--data", data, says=("no adapter_config.json",))
    other = get_peft_model(load_model(llm), LoraConfig(target_modules=["lm_head"], r=2))
    other.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(llm), prompt).save_pretrained(tmp_path / "prompt")
    for name in ("head", "prompt"):
        fails(llm, "--adapter", tmp_path / name, "--data", data, says=("changes the prompt or the head",))
    for name, says, settings in (
        ("pissa", "init_lora_weights is 'pissa', whose start changes", {"init_lora_weights": "pissa"}),
        ("alora", "outside the decoder's modules too", {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}),
        ("tokens", "outside the decoder's modules too", {"trainable_token_indices": [3, 5]}),  # tied to the head
    ):
        more = get_peft_model(load_model(llm), LoraConfig(target_modules=["q_proj"], r=2, **settings))
        for parameter in more.parameters():
            parameter.data += 0.1 * parameter.requires_grad
        more.save_pretrained(tmp_path / name)
        fails(llm, "--adapter", tmp_path / name, "--data", data, says=(says,))
    pickled = tmp_path / "pissa" / "adapter_model.bin"
    (tmp_path / "pissa" / "adapter_model.safetensors").rename(pickled)
    (tmp_path / "pissa" / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    fails(llm, "--adapter", tmp_path / "pissa", "--data", data, says=("has adapter_model.bin, a pickle",))
    wrong = adapter.rename(tmp_path / "wrong")
    settings = json.loads((wrong / "adapter_config.json").read_text())
    for change in ({"r": 3}, {"target_modules": ["k_proj"]}, {"peft_type": "NEW"}):
        (wrong / "adapter_config.json").write_text(json.dumps(settings | change))
        fails(llm, "--adapter", wrong, "--data", data, says=("--adapter", "wrong"))
    tensors = load_file(wrong / "adapter_model.safetensors")
    (wrong / "adapter_config.json").write_text(json.dumps(settings))
    part = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(part, wrong / "adapter_model.safetensors")
    fails(llm, "--adapter", wrong, "--data", data, says=("lacks base_model.model.model.layers.1.",))
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(moved, wrong / "adapter_model.safetensors")
    (wrong / "adapter_config.json").write_text(json.dumps(settings))
    fails(llm, "--adapter", wrong, "--data", data, says=("the model has no place for", "layers.7."))
    for module, option in (("lm_eval.tasks", ("--tasks", "three")), ("rouge_score", ("--data", data, "--rouge"))):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        fails(llm, *option, says=("pip install 'legolm[eval]'",))
