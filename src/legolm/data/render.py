"""Conversations to tokens, prompt and answer apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from legolm.data.examples import Example, Message
from legolm.data.template import Turn, render_template, template_error
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
    return render_many((example,), tokenizer, max_length)[0]


def render_many(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """As `render`, of some at once, which is several times faster."""
    texts = _texts(examples, tokenizer)
    prompts = _encode([prompt for prompt, _ in texts], tokenizer)
    wholes = _encode([prompt + answer for prompt, answer in texts], tokenizer)
    found = []
    for (_, text), prompt, both in zip(texts, prompts, wholes, strict=True):
        # Generation starts from the prompt's own tokens, so the loss must be on what follows exactly those. If a
        # token of the whole text spans the border, the answer is tokenized by itself; else the whole text serves,
        # since some tokenizers put a space before the first word of a text.
        answer = both[len(prompt) :] if both[: len(prompt)] == prompt else _encode([text], tokenizer)[0]
        # One token of the prompt must stay: no logit predicts the first token of a sequence. A text's is its own.
        prompt, answer = (prompt, answer) if prompt else (answer[:1], answer[1:])
        truncated = len(prompt) + len(answer) > max_length
        answer = answer[: max_length - 1]
        prompt = prompt[-(max_length - len(answer)) :]
        found.append(Tokens(ids=(*prompt, *answer), answer=len(prompt), truncated=truncated))
    return found


def render_whole(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, option: str
) -> list[Tokens]:
    """All conversations. Raises `LegolmError` for one of more than `length` tokens, the model's context."""
    found = render_many(examples, tokenizer, length)
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


def _texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Each one's prompt, and its answer with what ends the assistant's turn."""
    chats = [] if tokenizer.chat_template is None else [one.messages for one in examples if not one.raw]
    written = iter(_templated(chats, tokenizer))
    return [_plain(one, tokenizer) if one.raw or not chats else next(written) for one in examples]


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Without a template: as it stands, or a message a line."""
    *before, last = example.messages
    if not example.raw and any(message.more for message in example.messages):
        raise LegolmError("data: tool calls need a chat template, and the model has none; take another model")
    end = "" if example.raw else "\n"
    return "".join(f"{message.content}{end}" for message in before), last.content + _end(tokenizer)


def _templated(chats: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    wanted: list[tuple[list[Turn], bool]] = []
    for messages in chats:
        turns = [message.turn for message in messages]
        marked: list[Turn] = [*turns[:-1], {"role": "assistant", "content": _MARK}]
        wanted += [(turns[:-1], True), (turns, False), (marked, False)]
    if not chats:
        return []
    try:
        texts = render_template(tokenizer, wanted)
    except LegolmError:
        if len(chats) == 1:
            raise
        # One may do what it likes with the time and memory of one: it is found there.
        return [_templated([messages], tokenizer)[0] for messages in chats]
    return [_parted(*three, tokenizer) for three in zip(texts[::3], texts[1::3], texts[2::3], strict=True)]


def _parted(prompt: str, whole: str, marked: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template makes of the turns before the answer, of all, and of all with a mark as the answer."""
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


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return found
