"""Conversations to tokens, prompt and answer apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from legolm.data.examples import Example
from legolm.data.template import render_template, template_error
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "(the answer)"
"""In an answer's place it shows what the template writes before and after, whatever the answer begins or ends with."""


@dataclass(frozen=True)
class Tokens:
    """A conversation. The answer is `ids[answer:]`, its end-of-turn token included; `answer` is 1 or more.

    `truncated`: it was longer.
    """

    ids: tuple[int, ...]
    answer: int
    truncated: bool = False


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """At most `max_length` tokens (2 or more) of the conversation in the tokenizer's chat template.

    The prompt loses its start if it is too long, and the answer its end only if it is too long by itself.
    """
    prompt_text, answer_text = _texts(example, tokenizer)
    prompt = _encode(prompt_text, tokenizer)
    both = _encode(prompt_text + answer_text, tokenizer)
    # Generation starts from the prompt's own tokens, so the loss must be on what follows exactly those. If a
    # token of the whole text spans the border, the answer is tokenized by itself; else the whole text serves,
    # since some tokenizers put a space before the first word of a text.
    answer = both[len(prompt) :] if both[: len(prompt)] == prompt else _encode(answer_text, tokenizer)
    # One token of the prompt must stay: no logit predicts the first token of a sequence. A text's is its own first.
    prompt, answer = (prompt, answer) if prompt else (answer[:1], answer[1:])
    truncated = len(prompt) + len(answer) > max_length
    answer = answer[: max_length - 1]
    prompt = prompt[-(max_length - len(answer)) :]
    return Tokens(ids=(*prompt, *answer), answer=len(prompt), truncated=truncated)


def render_whole(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, option: str
) -> list[Tokens]:
    """All conversations. Raises `LegolmError` for one of more than `length` tokens, the model's context."""
    found = [render(example, tokenizer, length) for example in examples]
    for place, one in enumerate(found, 1):
        if one.truncated:
            raise LegolmError(
                f"{option}: conversation {place} has more than the {length} tokens that the model takes; shorten it, "
                "or leave it out"
            )
    return found


def check_whole(examples: Sequence[Tokens], length: int, split: str, client: str) -> None:
    """Raise `LegolmError` when one of them had more than `length` tokens."""
    for place, example in enumerate(examples):
        if example.truncated:
            raise LegolmError(
                f"data: {split} example {place} of {client!r} is longer than {length} tokens; raise "
                "train.max_length as far as the model's context allows, or set train.long_examples=truncate"
            )


def _texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt, and the answer with what ends the assistant's turn."""
    messages, content = example.messages, example.messages[-1].content
    if example.raw:
        return "".join(message.content for message in messages[:-1]), content + _end(tokenizer)
    if tokenizer.chat_template is None:
        if any(message.more for message in messages):
            raise LegolmError("data: tool calls need a chat template, and the model has none; take another model")
        prompt = "".join(f"{message.content}\n" for message in messages[:-1])
        return prompt, content + _end(tokenizer)
    turns = [message.turn for message in messages]
    marked_turns = [*turns[:-1], {"role": "assistant", "content": _MARK}]
    prompt, whole, marked = render_template(tokenizer, [(turns[:-1], True), (turns, False), (marked_turns, False)])
    before, mark, after = marked.rpartition(_MARK)
    if not mark:
        raise template_error(tokenizer, "leaves out the answer, or writes another one")
    if not whole.startswith(prompt):
        # The template puts more in the generation prompt (`<think>`) than it leaves in a finished turn. Then
        # the prompt is what both share, but nothing of the answer, which may begin like what was left out.
        shared = takewhile(lambda signs: len(set(signs)) == 1, zip(prompt, before, whole, strict=False))
        prompt = "".join(signs[0] for signs in shared)
    # Whitespace after the end of the turn belongs to the next turn: nobody generates it.
    answer = whole[len(prompt) :].rstrip()
    if not prompt or not answer:
        raise template_error(tokenizer, f"writes nothing {'before the answer' if answer else 'of the answer'}")
    # A template that writes nothing after the answer would teach the model never to stop.
    return prompt, answer if after.strip() else answer + _end(tokenizer)


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise LegolmError(
            "model: its tokenizer has no eos_token to end answers with; name one in tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
