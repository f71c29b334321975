from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from legolm import config as configs
from legolm.config import CalibrationConfig, Fields, RowsConfig, RunConfig
from legolm.data import calibration_tokens, check_text
from legolm.errors import LegolmError
from legolm.plan import make_plan
from legolm.prune import collected, cut_blocks
from legolm.system import Progress


def test_starter_alternates_conversations_and_prose(tokenizer: PreTrainedTokenizerFast) -> None:
    config = CalibrationConfig(samples=5, length=400)
    tokens = calibration_tokens(config, tokenizer, seed=0)
    assert tokens.shape == (5, 400)
    assert tokens.dtype == torch.int64
    talks = ["<|im_start|>assistant" in tokenizer.decode(sample) for sample in tokens]
    assert talks == [True, False, True, False, True]


def test_starter_is_limited_by_the_shorter_half(tokenizer: PreTrainedTokenizerFast) -> None:
    prose = CalibrationConfig(text="pydoc", samples=10**6, length=4096)
    both = CalibrationConfig(samples=10**6, length=4096)
    with pytest.raises(LegolmError, match=r"has \d+ samples") as caught:
        calibration_tokens(prose, tokenizer, seed=0)
    windows = int(str(caught.value).split(" has ")[1].split()[0])
    with pytest.raises(LegolmError, match=rf"'starter' has {2 * windows + 1} samples"):
        calibration_tokens(both, tokenizer, seed=0)


@pytest.mark.parametrize("text", ["starter", "pydoc"])
def test_the_seed_decides_the_windows(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    config = CalibrationConfig(text=text, samples=4, length=64)
    tokens = calibration_tokens(config, tokenizer, seed=1)
    assert torch.equal(tokens, calibration_tokens(config, tokenizer, seed=1))
    assert not torch.equal(tokens, calibration_tokens(config, tokenizer, seed=2))


def test_file_windows_do_not_overlap_and_cover_the_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("aaaaaaaabbbbbbbbccccccccddd", encoding="utf-8")
    tokens = calibration_tokens(CalibrationConfig(text=str(path), samples=3, length=8), tokenizer, seed=0)
    assert sorted(tokenizer.decode(sample) for sample in tokens) == ["a" * 8, "b" * 8, "c" * 8]


def test_every_window_begins_with_bos_once(bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("aaaaaaabbbbbbbcccccccddd", encoding="utf-8")
    tokens = calibration_tokens(CalibrationConfig(text=str(path), samples=3, length=8), bos_tokenizer, seed=0)
    found = sorted(bos_tokenizer.decode(sample) for sample in tokens)
    assert found == ["<|im_start|>" + sign * 7 for sign in "abc"]
    path = tmp_path / "talks.jsonl"
    path.write_text('{"instruction": "a", "output": "bcdef"}\n' * 9, encoding="utf-8")
    tokens = calibration_tokens(CalibrationConfig(text=str(path), samples=6, length=9), bos_tokenizer, seed=0)
    # A conversation is BOS, a, line break, bcdef, end: 9 tokens, so that each window is one.
    assert {bos_tokenizer.decode(sample) for sample in tokens} == {"<|im_start|>a\nbcdef<|im_end|>"}


def test_conversations_of_a_task_are_rendered(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(f'{{"question": "Say {i}", "answer": "yes {i}"}}\n' for i in range(20)), encoding="utf-8")
    fields = Fields(instruction="question", answer="answer")
    tokens = calibration_tokens(CalibrationConfig(text=str(path), fields=fields, samples=6, length=100), tokenizer, 0)
    text = "".join(tokenizer.decode(sample) for sample in tokens)
    assert text.count("<|im_start|>assistant\nyes") > 5
    with pytest.raises(LegolmError, match=r"task\.jsonl:1: fields question, answer are of no known layout"):
        calibration_tokens(CalibrationConfig(text=str(path)), tokenizer, 0)


def test_all_of_long_rows_is_there_to_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def windows(samples: int, length: int = 8) -> list[str]:
        config = CalibrationConfig(text=str(path), samples=samples, length=length)
        return [tokenizer.decode(one) for one in calibration_tokens(config, tokenizer, seed=0)]

    path = tmp_path / "texts.jsonl"
    texts = [sign * 40 + sign.upper() * 7 for sign in "abc"]  # and an end: six samples each
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    assert sorted(windows(3)) == ["a" * 8, "b" * 8, "c" * 8]  # some of each where that is enough
    assert sorted("".join(windows(18)).replace("<|im_end|>", "")) == sorted("".join(texts))
    with pytest.raises(LegolmError, match="has 18 samples of 8 tokens"):
        windows(19)
    path = tmp_path / "talks.jsonl"  # a conversation is packed with others, with the start of its question
    path.write_text('{"instruction": "Why is this a question?", "output": "No."}\n' * 4, encoding="utf-8")
    assert {"<|im_start|>user\nWh", "y is thi", "s a ques", "tion?<|im_end|>\n<|im_start|>"} < set(windows(5))


@pytest.mark.parametrize(("signs", "samples"), [(27, 3), (7, 0), (0, 0)])
def test_too_short_says_how_many_samples_there_are(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, signs: int, samples: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * signs, encoding="utf-8")
    with pytest.raises(LegolmError, match=rf"calibration.samples = 4: .* has {samples} samples of 8 tokens; "):
        calibration_tokens(CalibrationConfig(text=str(path), samples=4, length=8), tokenizer, seed=0)


def test_missing_file_and_wrong_encoding(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=r"calibration.text: no file absent.txt"):
        calibration_tokens(CalibrationConfig(text="absent.txt"), tokenizer, seed=0)
    path = tmp_path / "text.txt"
    path.write_bytes(b"ok\n\xff")
    with pytest.raises(LegolmError, match=r"text.txt:2: not UTF-8"):
        calibration_tokens(CalibrationConfig(text=str(path)), tokenizer, seed=0)
    with pytest.raises(LegolmError, match=r"text.txt:2: not UTF-8"):  # what a plan asks
        check_text(str(path), RowsConfig(), "calibration.text")


def test_a_pattern_is_all_files_that_match_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, text in (("b", "bbbb"), ("a", "aaa")):
        (tmp_path / f"{name}.txt").write_text(text)
    pattern = f"{tmp_path}/*.txt"
    check_text(pattern, RowsConfig(), "calibration.text")
    (tokens,) = calibration_tokens(CalibrationConfig(text=pattern, samples=1, length=8), tokenizer, seed=0)
    assert tokenizer.decode(tokens) == "aaa\nbbbb"


def test_a_file_that_changed_since_is_looked_at_anew(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    for _ in range(2):
        assert check_text(str(path), RowsConfig(), "calibration.text") == ["calibration.text: alpaca: 1 of 1 rows."]
    path.write_text('{"instruction": "a", "output": ""}\n', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(LegolmError, match=r"talks\.jsonl:1"):
            check_text(str(path), RowsConfig(), "calibration.text")
    path.unlink()
    with pytest.raises(LegolmError, match=r"talks\.jsonl"):
        check_text(str(path), RowsConfig(), "calibration.text")


def test_what_a_cut_would_refuse_the_plan_refuses(
    tiny: Callable[[str], Path], three_clients: Any, tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("wide", "half", "dense"))
    for name, given, says in (
        (
            "length",
            {"length": 1 << 20},
            r"wide: calibration\.length: 1048576 tokens are more than the model takes at once, ",
        ),
        ("samples", {"samples": 10**6}, r"wide: calibration\.samples = 1000000: .* has \d+ samples"),
    ):
        asked = copy.deepcopy(raw)
        for block in asked["blocks"]:
            if block["name"] == "wide":
                block["calibration"] = block["calibration"] | given
        with pytest.raises(LegolmError, match=says):
            make_plan(configs.validate(RunConfig, asked, "test"))
        if name == "length":  # and who plans nothing
            base, tokens = tiny("llama"), torch.zeros(1, 1 << 20, dtype=torch.int64)
            with pytest.raises(LegolmError, match="are more than the model takes at once"):
                list(collected(base, tokens, "diagonal", "fp32", Progress()))


@pytest.mark.parametrize(
    ("method", "calibration", "recover", "says"),
    [
        (
            "wanda",
            {},
            {"text": "SHORT"},
            r"block b: recover\.text: '.*short\.txt' has 0 samples of 64 tokens; ask for sh",
        ),
        ("magnitude", {"text": "SHORT"}, {}, r"block b: calibration\.text: '.*short\.txt' has 0 samples of 64 tokens"),
        ("window", {"length": 600}, {}, r"block b: calibration\.length: 600 tokens are more than the model takes"),
        ("magnitude", {"length": 600}, {"text": "LONG"}, r"block b: calibration\.length: 600 tokens are more than the"),
    ],
)
def test_what_recovery_would_refuse_is_refused_before_the_cut(
    method: str,
    calibration: dict[str, Any],
    recover: dict[str, Any],
    says: str,
    tiny: Callable[[str], Path],
    three_clients: Any,
    tmp_path: Path,
) -> None:
    raw = three_clients(tmp_path, ("wide", "dense", "dense"))
    texts = {"SHORT": tmp_path / "short.txt", "LONG": Path(raw["blocks"][0]["calibration"]["text"])}
    texts["SHORT"].write_text("Hello there.")
    target = {"intermediate_size": 64} if method == "window" else {"sparsity": 0.5}
    block: dict[str, Any] = {
        "name": "b",
        "method": method,
        "calibration": {"text": "LONG", "samples": 4, "length": 64} | calibration,
        "recover": {"steps": 1, "batch_size": 2} | recover,
    } | target
    for section in ("calibration", "recover"):
        if text := block[section].get("text"):
            block[section]["text"] = str(texts[text])
    raw["blocks"], raw["clients"] = [block, {"name": "dense", "method": "dense"}], [{"id": "fr", "block": "b"}]
    config = configs.validate(RunConfig, raw, "test")
    with pytest.raises(LegolmError, match=says):
        make_plan(config)
    base = tiny("gpt2")  # which has no place beyond its context
    with pytest.raises(LegolmError, match=says):  # who plans nothing
        cut_blocks(base, "print", [(config.blocks[0], tmp_path / "b")], 0, "fp32", Progress())
    assert not (tmp_path / "b").exists()
