"""Which tokens are learned: of text all, of pairs the completion, of conversations the last turn or each."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from legolm.data import Example, Message, TokenRows, Tokens, prose, render, store, tokenize
from legolm.data.prose import SPANS, read_prose, read_text, text_tokens
from legolm.data.sequence import border_token, encode, encode_all
from legolm.data.store import Examples
from legolm.errors import LegolmError

CHAT = Example(
    (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
        Message("user", "+ 1?"),
        Message("assistant", "5"),
    )
)
TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def learned(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(tokens.ids[tokens.answer :]))


def test_the_last_turn_or_each_of_the_assistants(tokenizer: PreTrainedTokenizerFast) -> None:
    (last,) = tokenize([CHAT], tokenizer, 512)
    assert last == render(CHAT, tokenizer, 512)
    first, second = tokenize([CHAT], tokenizer, 512, "all")
    assert second == last
    assert learned(first, tokenizer) == "4<|im_end|>"
    assert tokenizer.decode(first.ids).endswith("+ 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>")


def test_pairs_are_joined_as_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Example((Message("user", "The town is"), Message("assistant", " Lyon.")), raw=True)
    (tokens,) = tokenize([pair], tokenizer, 512, "all")
    assert tokenizer.decode(tokens.ids) == "The town is Lyon.<|im_end|>"
    assert learned(tokens, tokenizer) == " Lyon.<|im_end|>"


@given(
    text=st.text(st.characters(codec="ascii", categories=("L", "Zs")), min_size=1, max_size=60),
    length=st.integers(2, 20),
)
@settings(max_examples=30)
def test_a_text_is_learned_whole_each_token_once(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> None:
    example = Example((Message("assistant", text),), raw=True)
    pieces = list(tokenize([example, CHAT, example], tokenizer, length))
    half = pieces[: len(pieces) // 2]
    assert half == pieces[-len(half) :]
    assert all(len(one.ids) <= length and not one.truncated for one in half)
    whole = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    assert [id for one in half for id in one.ids[one.answer :]] == whole[1:]


def test_calls_of_tools_are_what_is_learned_where_nothing_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    calling = copy.deepcopy(tokenizer)
    calling.chat_template = TOOLS
    more = '{"content": null, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2.5}}}]}'
    chat = Example(
        (Message("user", "?"), Message("assistant", "", more), Message("tool", "4"), Message("assistant", "It is 4."))
    )
    first, second = tokenize([chat], calling, 512, "all")
    assert learned(first, calling) == '[add {"a": 2.5}]<end>'
    assert calling.decode(second.ids).startswith('<user>?<end><assistant>[add {"a": 2.5}]<end><tool>4<end>')
    calling.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(LegolmError, match=r"leaves out the calls of tools that are an answer; .*data\.template"):
        tokenize([Example(chat.messages[:2])], calling, 512)  # it writes "None"
    assert tokenize([chat], calling, 512)[0].left_out
    with pytest.raises(LegolmError, match="tool calls need a chat template"):
        calling.chat_template = None
        tokenize([chat], calling, 512)


def test_tools_are_in_the_prompt_where_the_template_has_them(tokenizer: PreTrainedTokenizerFast) -> None:
    calling = copy.deepcopy(tokenizer)
    calling.chat_template = "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}" + TOOLS
    chat = Example((Message("user", "?"), Message("assistant", "4")), tools='[{"function": {"name": "add"}}]')
    other = Example(chat.messages)
    one, two = (calling.decode(found.ids) for found in tokenize([chat, other], calling, 512))
    assert (one, two) == ("(add)<user>?<end><assistant>4<end>", "<user>?<end><assistant>4<end>")


def test_tokens_are_flat_and_come_back(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [Example((Message("user", "?" * n), Message("assistant", str(n)))) for n in range(1, 70)]
    found = tokenize(chats, tokenizer, 40)
    rendered = [render(one, tokenizer, 40) for one in chats]
    assert list(found) == rendered
    assert found[-1] == rendered[68]
    assert found[3:5] == rendered[3:5]
    assert found.lengths.tolist() == [len(one.ids) for one in rendered]
    assert found.tokens == found.lengths.sum()


@given(rows=st.lists(st.lists(st.integers(0, 300_000), min_size=2, max_size=4), min_size=1, max_size=6))
def test_tokens_of_any_vocabulary(rows: list[list[int]]) -> None:
    found, wanted = TokenRows(), [Tokens(tuple(ids), 1, len(ids) > 3) for ids in rows]
    for one in wanted:
        found.add(one)
    assert list(found) == wanted


@pytest.mark.parametrize("kept", [0, 100, 1 << 26])
def test_examples_come_back_from_memory_and_from_a_file(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(store, "IN_MEMORY", kept)
    pair = Example((Message("user", "é\u2028"), Message("assistant", "☃")), raw=True)
    chats = [CHAT, pair, Example((Message("assistant", "", '{"content": null}'),))] * 3
    found = Examples.of(chats)
    assert found == chats and list(found) == chats and found[-1] == chats[-1]
    assert found[1:3] == chats[1:3] != found[:2] and len(found[:0]) == 0


def test_only_what_is_needed_of_a_long_text_is_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "PIECE", 1 << 14)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {n} é\n" for n in range(5000)), encoding="utf-8")
    whole = read_text(path, "--text")
    assert whole.startswith(read_text(path, "--text", 1001))
    most, ids = 10_000, np.frombuffer(whole[:20_000].encode(), dtype=np.uint8)
    found = text_tokens(whole, tokenizer, most)
    assert len(found) == most and tokenizer.decode(found[:100]) == bytes(ids[:100]).decode(errors="replace")
    assert len(whole) > 3 * prose.PIECE
    assert len(text_tokens(whole, tokenizer)) == len(whole.encode())
    drawn = read_prose([path], "text", 32_000, 0)
    assert 31_000 < len(drawn.encode()) <= 32_000 + SPANS
    assert drawn == read_prose([path], "text", 32_000, 0) != read_prose([path], "text", 32_000, 1)
    assert len(set(drawn.splitlines()) - set(whole.splitlines())) <= 2 * SPANS
    with path.open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(LegolmError, match=r"long.txt:5001: not UTF-8"):
        read_prose([path], "text", 32_000, 0)


ODD = ["", " ", "a", "Ünï\u2028 \U0001f600\n\n\tx  ", "<|im_start|>user\n<|im_end|>", "<|im_", "b" * 3000, "\x00"]


@pytest.mark.parametrize("splits", [False, True])
def test_tokens_are_those_of_transformers(tokenizer: PreTrainedTokenizerFast, splits: bool) -> None:
    """Also where a call of before, or its file, left a limit and padding in it."""
    ours, theirs = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    ours.split_special_tokens = theirs.split_special_tokens = splits
    ours(["a", "bbb"], max_length=2, truncation=True, padding=True)
    assert encode_all(ODD, ours) == theirs(ODD, add_special_tokens=False, verbose=False)["input_ids"]


@given(
    st.lists(st.sampled_from([*ODD, "<|im_start|>", "<|im_end|>", " \n", "assistant\n"]), max_size=6), st.integers(0, 6)
)
def test_a_text_falls_apart_at_the_border_token(tokenizer: PreTrainedTokenizerFast, parts: list[str], cut: int) -> None:
    before, after = "".join(parts[:cut]), "<|im_start|>" + "".join(parts[cut:])
    assert border_token("<|im_end|>\n<|im_start|>assistant\n", tokenizer) == "<|im_start|>"
    assert encode(before, tokenizer) + encode(after, tokenizer) == encode(before + after, tokenizer)


@pytest.mark.parametrize(
    "wide", [{"lstrip": True}, {"single_word": True}, {"normalized": True}, {"special": False}], ids=str
)
def test_no_border_at_a_token_that_its_neighbours_widen(
    tokenizer: PreTrainedTokenizerFast, wide: dict[str, bool]
) -> None:
    ours = copy.deepcopy(tokenizer)
    ours.add_tokens([AddedToken("<turn>", **({"special": True, "normalized": False} | wide))])
    assert border_token("a<turn>b", ours) is None
    ours.add_tokens([AddedToken("<last>", special=True, normalized=False)], special_tokens=True)
    assert border_token("a<last>b", ours) == "<last>"
    ours.add_tokens(
        [AddedToken("b<la", special=True, normalized=False)], special_tokens=True
    )  # ab<last> begins earlier
    assert border_token("a<last>b", ours) is None
