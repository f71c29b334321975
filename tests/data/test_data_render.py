from __future__ import annotations

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from legolm.data import Example, Tokens, begin
from legolm.data.examples import Message
from legolm.data.render import render
from legolm.errors import LegolmError

PAIR = Example((Message("user", "Capital of Italy?"), Message("assistant", "Rome")))
PROMPT = "<|im_start|>user\nCapital of Italy?<|im_end|>\n<|im_start|>assistant\n"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def parts(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    return tokenizer.decode(tokens.ids[: tokens.answer]), tokenizer.decode(tokens.ids[tokens.answer :])


class TestRender:
    def test_answer_is_the_text_and_the_end_of_turn_without_the_line_break(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        tokens = render(PAIR, tokenizer, 512)
        assert parts(tokens, tokenizer) == (PROMPT, "Rome<|im_end|>")
        assert len(tokens.ids) - tokens.answer == 5

    def test_earlier_turns_are_in_the_prompt(self, tokenizer: PreTrainedTokenizerFast) -> None:
        example = Example((*PAIR.messages, Message("user", "And of Spain?"), Message("assistant", "Madrid")))
        prompt, answer = parts(render(example, tokenizer, 512), tokenizer)
        assert prompt.startswith(PROMPT + "Rome<|im_end|>\n")
        assert answer == "Madrid<|im_end|>"

    @given(answer=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), length=st.integers(2, 90))
    @example(answer=">", length=10)  # as the end of the turn ends
    @settings(max_examples=50)
    def test_any_answer_comes_back_and_no_length_is_exceeded(
        self, tokenizer: PreTrainedTokenizerFast, answer: str, length: int
    ) -> None:
        example = Example((Message("user", "?"), Message("assistant", answer)))
        whole, cut = render(example, tokenizer, 10_000), render(example, tokenizer, length)
        assert parts(whole, tokenizer)[1] == answer + "<|im_end|>"
        assert len(cut.ids) == min(length, len(whole.ids))
        assert cut.answer >= 1
        assert cut.ids[cut.answer :] == whole.ids[whole.answer :][: length - 1]
        prompt = whole.ids[: whole.answer]
        if cut.answer < whole.answer:
            head = len("_user\n") if cut.answer > len("_user\n") else 1
            prompt = prompt[:head] + prompt[len(prompt) - cut.answer + head :]
        assert cut.ids[: cut.answer] == prompt

    def test_too_long_loses_the_start_of_the_question(self, tokenizer: PreTrainedTokenizerFast) -> None:
        end = "<|im_end|>\n<|im_start|>assistant\n"
        assert parts(render(PAIR, tokenizer, 30), tokenizer) == (f"<|im_start|>user\nItaly?{end}", "Rome<|im_end|>")
        assert parts(render(PAIR, tokenizer, 8), tokenizer) == ("<|im_start|>t\n", "Rome<|im_end|>")

    @pytest.mark.parametrize("template", [True, False], ids=["chatml", "plain"])
    def test_too_long_keeps_bos_and_the_system_message(
        self, tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, template: bool
    ) -> None:
        found = with_template(bos_tokenizer, str(tokenizer.chat_template) if template else None)
        question = Message("user", "Capital of Italy? " * 9)
        example = Example((Message("system", "Be brief."), question, *PAIR.messages[1:], *PAIR.messages))
        cut = render(example, found, 100)
        prompt, answer = parts(cut, found)
        kept = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" if template else "<|im_start|>Be brief.\n"
        assert prompt.startswith(kept)
        assert render(example, found, 10_000).ids[-30:] == cut.ids[-30:]
        assert (len(cut.ids), answer) == (100, "Rome<|im_end|>")

    def test_too_long_answer_loses_its_end_and_keeps_a_token_to_start_from(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert parts(render(PAIR, tokenizer, 4), tokenizer) == ("<|im_start|>", "Rom")

    def test_without_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        plain = with_template(tokenizer, None)
        example = Example((Message("system", "Be brief."), *PAIR.messages))
        assert parts(render(example, plain, 512), plain) == (
            "Be brief.\nCapital of Italy?\n",
            "Rome<|im_end|>",
        )

    def test_template_without_end_of_turn_gets_one(self, tokenizer: PreTrainedTokenizerFast) -> None:
        open_ended = with_template(
            tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        )
        assert parts(render(PAIR, open_ended, 512), open_ended)[1].endswith("assistant: Rome<|im_end|>")

    @pytest.mark.parametrize("answer", ["Rome", "<b>Rome</b>"])
    def test_generation_prompt_with_more_than_the_finished_turn(
        self, tokenizer: PreTrainedTokenizerFast, answer: str
    ) -> None:
        assert tokenizer.chat_template is not None
        thinking = with_template(
            tokenizer, tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
        )
        example = Example((PAIR.messages[0], Message("assistant", answer)))
        tokens = render(example, thinking, 512)
        assert parts(tokens, thinking) == (PROMPT, answer + "<|im_end|>")
        assert tokens.unopened and not render(example, tokenizer, 512).unopened
        opened = Example((PAIR.messages[0], Message("assistant", f"<think>\nso</think>{answer}")))
        assert not render(opened, thinking, 512).unopened

    @pytest.mark.parametrize(
        ("template", "answer"),
        [
            ("(m['content'].split('</think>') | last)", "<think>sea, hills</think>Rome"),
            ("(m['content'] | trim)", " Rome\n"),
            ("(m['content'] | replace('R', 'r'))", "Rome"),
        ],
    )
    @pytest.mark.parametrize("opening", ["", "<think>\n"], ids=["plain", "opened"])
    def test_answer_that_the_template_would_change_stays_as_it_is(
        self, tokenizer: PreTrainedTokenizerFast, template: str, answer: str, opening: str
    ) -> None:
        changing = str(tokenizer.chat_template).replace("message['content']", template.replace("m[", "message["))
        changing = changing.replace("assistant\n' }}", f"assistant\n{opening}' }}}}")
        found = with_template(tokenizer, changing)
        tokens = render(Example((PAIR.messages[0], Message("assistant", answer))), found, 512)
        assert parts(tokens, found) == (PROMPT, answer + "<|im_end|>")
        assert tokens.rewritten
        assert not render(PAIR, tokenizer, 512).rewritten

    def test_whitespace_of_the_answer_is_learned_where_nothing_follows_it(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        bare = with_template(tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
        tokens = render(Example((PAIR.messages[0], Message("assistant", "Rome\n"))), bare, 512)
        assert parts(tokens, bare)[1].endswith("Rome\n<|im_end|>")

    def test_begins_with_bos_once(
        self, tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        bos = bos_tokenizer.bos_token_id
        assert begin(bos_tokenizer) == [bos]
        plain = render(PAIR, bos_tokenizer, 512)
        assert parts(plain, bos_tokenizer) == ("<|im_start|>Capital of Italy?\n", "Rome<|im_end|>")
        chat = with_template(bos_tokenizer, str(tokenizer.chat_template))
        assert render(PAIR, chat, 512).ids[:2] == (bos, *chat.encode("u", add_special_tokens=False))
        own = Example((Message("user", "<|im_start|>Capital?"), PAIR.messages[1]))
        assert render(own, bos_tokenizer, 512).ids.count(bos) == 1

    @pytest.mark.parametrize(
        ("single", "first"), [("$A", []), ("$A <|im_end|>", []), ("<|unk|> <|pad|> $A <|im_end|>", [258, 259])]
    )
    def test_begin_is_what_the_tokenizer_puts_before_a_text(
        self, tokenizer: PreTrainedTokenizerFast, single: str, first: list[int]
    ) -> None:
        other = copy.deepcopy(tokenizer)
        names = ["<|im_end|>", "<|unk|>", "<|pad|>"]
        special = [(name, other.convert_tokens_to_ids(name)) for name in names]
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        assert begin(other) == first

    def test_template_that_refuses(self, tokenizer: PreTrainedTokenizerFast) -> None:
        picky = with_template(tokenizer, "{{ raise_exception('no system role') }}")
        with pytest.raises(LegolmError, match=r"refuses the data \(no system role\)"):
            render(PAIR, picky, 512)

    def test_no_end_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        endless = with_template(tokenizer, None)
        endless.eos_token = None
        with pytest.raises(LegolmError, match="no eos_token"):
            render(PAIR, endless, 512)

    def test_prompt_is_tokenized_as_generation_sees_it_where_a_token_spans_the_border(self) -> None:
        vocab = {"a": 0, "b": 1, "Ċ": 2, "Ċb": 3, "<end>": 4}
        model = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "b")]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        merging = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")
        assert merging.encode("a\nb") == [0, 3]
        example = Example((Message("user", "a"), Message("assistant", "b")))
        assert render(example, merging, 9) == Tokens(ids=(0, 2, 1, 4), answer=2)
