"""How a prompt looks where the config says it: ours by hand, a file's, the day, and what goes with the tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from legolm import config as configs
from legolm.config import DataConfig
from legolm.data import DATE, Example, Message, prompt_look, render, set_template, take_look
from legolm.errors import LegolmError

BRIEF = Example((Message("system", "Be brief."), Message("user", "Italy?"), Message("assistant", "Rome")))
TWO = Example((*BRIEF.messages[1:], Message("user", "Spain?"), Message("assistant", "Madrid")))
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
DAY = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m['role'] + ' ' + m['content'] }}\n{% endfor %}"


def parts(example: Example, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> tuple[str, str]:
    found = copy.deepcopy(tokenizer)
    set_template(found, DataConfig(**settings))
    tokens = render(example, found, 512)
    return found.decode(tokens.ids[: tokens.answer]), found.decode(tokens.ids[tokens.answer :])


def test_alpaca_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    assert parts(BRIEF, tokenizer, template="alpaca") == (
        "Be brief.\n\n### Instruction:\nItaly?\n\n### Response:\n",
        "Rome<|im_end|>",
    )
    assert parts(TWO, tokenizer, template="alpaca") == (
        f"{PREAMBLE}\n\n### Instruction:\nItaly?\n\n### Response:\nRome<|im_end|>\n\n"
        "### Instruction:\nSpain?\n\n### Response:\n",
        "Madrid<|im_end|>",
    )


def test_alpaca_refuses_what_it_would_leave_out(tokenizer: PreTrainedTokenizerFast) -> None:
    late = Example((TWO.messages[0], Message("system", "Be brief."), TWO.messages[-1]))
    with pytest.raises(LegolmError, match="alpaca has messages of user and assistant, and of system at the start"):
        parts(late, tokenizer, template="alpaca")


@pytest.mark.parametrize(("end", "eos"), [("<|im_end|>", "<|im_end|>"), ("<|unk|>", "<|unk|>")])
def test_chatml_by_hand_ends_turns_with_eos_where_its_own_end_is_no_token(
    tokenizer: PreTrainedTokenizerFast, end: str, eos: str
) -> None:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if end != "<|im_end|>":
        raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] != "<|im_end|>"]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(raw))
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|pad|>")
    prompt = f"<|im_start|>system\nBe brief.{end}\n<|im_start|>user\nItaly?{end}\n<|im_start|>assistant\n"
    assert parts(BRIEF, found, template="chatml") == (prompt, f"Rome{end}")


def test_ours_begin_as_the_tokenizer_begins_a_text_and_only_once(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    for template in ("alpaca", "chatml"):
        plain, answer = parts(BRIEF, tokenizer, template=template)
        bos = "<|im_start|>" if template == "alpaca" else ""  # which ChatML has already
        assert parts(BRIEF, bos_tokenizer, template=template) == (bos + plain, answer)


def test_the_day_is_the_configs_and_is_saved_with_the_template(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(DAY)
    chosen = {"template": str(tmp_path / "own.jinja"), "date": "2026-01-02"}
    assert parts(BRIEF, tokenizer, **chosen)[0].startswith("02 Jan 2026: system Be brief.\n")
    own = copy.deepcopy(tokenizer)
    own.chat_template = DAY
    assert own.decode(render(BRIEF, own, 512).ids).startswith("26 Jul 2024: ")
    assert parts(BRIEF, own)[0].startswith("26 Jul 2024: ")
    set_template(own, DataConfig(**chosen))
    own.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.chat_template, again.init_kwargs[DATE]) == (DAY, "2026-01-02")
    assert render(BRIEF, again, 512) == render(BRIEF, own, 512)
    for one in (again, tokenizer):  # from another's template and day to its own, and from there to none
        take_look(own, prompt_look(one))
        assert prompt_look(own) == prompt_look(one)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "data.template: '.*own.jinja' is neither model, alpaca, chatml nor a file"),
        (b"\xff", "can be read .*utf-8"),
        (b"x" * (1 << 21), "can be read .*more than the 1048576 bytes"),
        (b"{% if", "data.template: .*own.jinja: it fails .*; mend it"),
        (b"{{ ''.__class__.__mro__ }}", "data.template: .*own.jinja: it .*unsafe"),
    ],
)
def test_a_bad_file_is_one_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(LegolmError, match=says):
        parts(BRIEF, tokenizer, template=str(tmp_path / "own.jinja"))


def test_a_bad_day_is_one_line() -> None:
    with pytest.raises(LegolmError, match="data: `date` = '2026-02-31': input should be a valid date"):
        configs.validate(DataConfig, {"date": "2026-02-31"}, "data")
