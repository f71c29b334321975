"""Losses, exact match, perplexity and ROUGE-L, example by example."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedTokenizerFast

from legolm.data import Example, Tokens, render
from legolm.data.examples import Message
from legolm.evaluation import Questions, answer_ends, measure, questions, reply, score, tokens_per_second
from legolm.evaluation.answers import score_each
from legolm.evaluation.greedy import generate
from legolm.evaluation.rouge import rouge_l
from legolm.evaluation.side_by_side import Subject, load_subject
from legolm.models import load_model


def _example(question: str, answer: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


def test_a_model_of_equal_logits_by_hand(unigram: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    # Each token is one of 260 alike: ln 260 a token, perplexity 260, and no spread at all.
    questions = Questions(examples=(_example("a", "bc"), _example("defg", "h")), text="x" * 100, length=10)
    figures = measure(unigram(), tokenizer, questions)
    loss, text = figures["answers"]["answer loss"], figures["text"]["perplexity"]
    assert (loss.value, loss.stderr, loss.count) == (pytest.approx(math.log(260)), pytest.approx(0, abs=1e-7), 2)
    assert (text.value, text.stderr, text.count) == (pytest.approx(260), pytest.approx(0, abs=1e-4), 10)
    assert figures["answers"]["exact match"].value == 0


def test_exact_match_needs_the_end_too(unigram: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    ends = Questions(examples=(_example("a", "b"),))
    model = unigram(**{"<|im_end|>": 5.0, "b": 9.0})  # always b, never the end
    assert measure(model, tokenizer, ends)["answers"]["exact match"].value == 0
    p = math.exp(9) / (math.exp(9) + math.exp(5) + 258)
    q = math.exp(5) / (math.exp(9) + math.exp(5) + 258)
    loss = measure(model, tokenizer, ends)["answers"]["answer loss"].value
    assert loss == pytest.approx(-(math.log(p) + math.log(q)) / 2, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2", "gpt2"])
def test_each_answer_is_scored_as_the_plain_model_does_alone(
    family: str, tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_model(tiny(family))
    examples = [render(_example("a" * (7 * i % 11), "b" * (5 * i % 9) + "c"), tokenizer, 256) for i in range(1, 9)]
    with torch.no_grad():
        logits = [model(torch.tensor([one.ids])).logits[0, one.answer - 1 : -1].double() for one in examples]
    answers = [torch.tensor(one.ids[one.answer :]) for one in examples]
    # One answer that is the likeliest: what `exact` is 1 for.
    told = [int(found.argmax()) for found in logits[0][:1]]
    examples.append(Tokens((*examples[0].ids[: examples[0].answer], *told), examples[0].answer))
    each = score_each(model, examples, 3, "fp32")
    expected = [float(cross_entropy(found, ids, reduction="sum")) for found, ids in zip(logits, answers, strict=True)]
    np.testing.assert_allclose(each.losses[:-1], expected, rtol=1e-4)
    assert each.exact.tolist() == [0.0] * 8 + [1.0]
    assert each.tokens.tolist() == [len(one.ids) - one.answer for one in examples]
    whole = score(model, examples, 3, "fp32")
    assert whole.loss == pytest.approx(each.losses.sum() / each.tokens.sum())
    assert whole.tokens == each.tokens.sum()
    # Of the ratio of two sums, answer by answer.
    errors = each.losses - whole.loss * each.tokens
    assert whole.stderr == pytest.approx((9 / 8 * (errors**2).sum()) ** 0.5 / whole.tokens)
    assert score(model, examples[:1], 3, "fp32").stderr is None


@pytest.mark.parametrize(("family", "shared"), [("llama", 29), ("gemma3_text", 29), ("gemma2", 0)])
def test_what_all_prompts_of_a_batch_begin_with_is_read_once(
    family: str, shared: int, tiny: Callable[[str], Path]
) -> None:
    """Not where attention is softcapped, or examples are long, which go another way."""
    model, read = load_model(tiny(family)), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    begin = tuple(range(20, 50))
    examples = [Tokens((*begin, 60 + i, *range(70, 70 + 4 * i), 7), 31 + i) for i in range(3)]
    examples.append(Tokens((*begin, 9, 8), 30))  # the last of `begin` predicts here: it is this example's own
    long = Tokens((*begin, *range(100, 200), 5) * 4, 500)
    tokens = sum(len(one.ids) for one in examples)
    together = score_each(model, examples, 4, "fp32").losses
    score_each(model, [*examples, long], 5, "fp32")
    assert read == [tokens - 3 * shared, tokens + len(long.ids)]
    np.testing.assert_allclose(together, score_each(model, examples, 1, "fp32").losses, rtol=1e-4)


def test_a_scored_model_is_as_it_was(tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(tiny("llama"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        score(model, [render(_example("a", "b"), tokenizer, 64)], 1, "bf16")
        assert torch.equal(model(ids).logits, before)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat": precision 2/4, recall 2/3, F1 4/7. Words of any script, whatever their case.
    found = rouge_l(["The cat ran away.", "États-Unis", "other", ""], ["the cat sat", "états unis", "words", "words"])
    assert found.tolist() == pytest.approx([4 / 7, 1, 0, 0])


def test_greedy_answers_end_where_the_template_ends_them(
    unigram: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "MAX_NEW_TOKENS", 5)
    examples = [render(_example(text, "b"), tokenizer, 64) for text in ("a", "longer", "c")]
    assert generate(unigram(b=9.0), examples, tokenizer, 2, "fp32", 5) == ["bbbbb"] * 3
    assert generate(unigram(b=9.0), examples, tokenizer, 2, "fp32", 2, "…") == ["bb…"] * 3
    assert generate(unigram(**{"<|im_end|>": 9.0}), examples, tokenizer, 2, "fp32", 5, "…") == [""] * 3
    asked = Questions(examples=(_example("a", "bbbbb"), _example("a", "c")), rouge=True)
    assert measure(unigram(b=9.0), tokenizer, asked)["answers"]["ROUGE-L"].value == 0.5


def test_generation_is_argmax_token_by_token(tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(tiny("llama"))
    examples = [render(_example(text, "b"), tokenizer, 64) for text in ("a", "much longer than the other")]
    for example, answer in zip(examples, generate(model, examples, tokenizer, 2, "fp32", 6), strict=True):
        ids = list(example.ids[: example.answer])
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[example.answer :], skip_special_tokens=True)


def turning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """It ends a turn with a special token that has no name of its own, as Phi-3's and Gemma's do."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens([AddedToken("<|turn|>", special=True)], special_tokens=True)
    found.chat_template = str(found.chat_template).replace("<|im_end|>", "<|turn|>")
    return found


def test_an_answer_ends_where_the_template_or_the_model_says(
    tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    turned = turning(tokenizer)
    turn = turned.convert_tokens_to_ids("<|turn|>")
    assert turn not in turned.all_special_ids
    model = load_model(tiny("llama"))
    model.generation_config.eos_token_id = [7, 8]
    assert answer_ends(turned) == sorted({turn, turned.eos_token_id})
    assert answer_ends(turned, model) == sorted({turn, turned.eos_token_id, 7, 8})


def test_an_answer_stays_within_the_context(tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(tiny("gpt2"))
    context = model.config.max_position_embeddings
    rows = [Tokens((65,) * length + (66,), length) for length in (3, context - 2)]
    for batch in (1, 2):
        assert len(generate(model, rows, tokenizer, batch, "fp32", 2 * context)) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_answer_does_not_depend_on_those_beside_it(
    family: str, tiny: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_model(tiny(family))
    context = model.config.max_position_embeddings
    rows = [Tokens((65,) * length + (66,), length) for length in (3, context - 10, context - 10, context - 4, 5)]
    together = generate(model, rows, tokenizer, 5, "fp32", 30)
    assert together == [generate(model, [row], tokenizer, 1, "fp32", 30)[0] for row in rows]
    ids = list(rows[0].ids[:3])
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids and together[0] == tokenizer.decode(ids[3:], skip_special_tokens=True)


OWN = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_length": 7, "num_beams": 2}
"""Settings of generation that change what is likeliest."""


def test_the_likeliest_token_is_that_of_the_model_and_not_of_its_settings(
    unigram: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = unigram(b=9.0)
    own = copy.deepcopy(model.generation_config)
    own.update(**OWN)
    model.generation_config = own
    assert generate(model, [render(_example("a", "b"), tokenizer, 64)], tokenizer, 1, "fp32", 5) == ["bbbbb"]
    assert "".join(reply(model, tokenizer, [Message("user", "a")], 5, 0.0)) == "bbbbb"
    assert tokens_per_second(model, "fp32") > 0
    assert model.generation_config is own  # which is what is saved with it


def test_a_model_in_memory_is_asked_in_float32_and_stays_as_it_is(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    subject = Subject("it", tiny("llama"), model=whole)
    assert {one.dtype for one in load_subject(subject).parameters()} == {torch.float32}
    assert {one.dtype for one in whole.parameters()} == {torch.bfloat16}
