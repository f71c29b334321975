"""Conversations to tokens, prompt and answer apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from legolm.data.examples import Example, Message
from legolm.data.sequence import begin, begun, encode
from legolm.data.template import Turn, render_template, template_error
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "(the answer)"
"""In an answer's place it shows what the template writes before and after, whatever the answer begins or ends with."""


@dataclass(frozen=True)
class Tokens:
    """A conversation. The answer is `ids[answer:]`, its end-of-turn token included; `answer` is 1 or more.

    `truncated`: it was longer. `rewritten`: the chat template would change the answer, which is here as it stands.
    """

    ids: tuple[int, ...]
    answer: int
    truncated: bool = False
    rewritten: bool = False


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """At most `max_length` tokens (2 or more) of the conversation in the tokenizer's chat template.

    It begins as the tokenizer begins a text (`begin`); a chat template writes its own begin. A prompt that is too long
    keeps this and the system message, and loses what follows them; the answer loses its end only if it is too long by
    itself. Raises `LegolmError` for a token that the model has no embedding for.
    """
    prompt_text, answer_text, rewritten = _texts(example.messages, tokenizer)
    prompt = encode(prompt_text, tokenizer)
    both = encode(prompt_text + answer_text, tokenizer)
    # Generation starts from the prompt's own tokens, so the loss must be on what follows exactly those. If a
    # token of the whole text spans the border, the answer is tokenized by itself; else the whole text serves,
    # since some tokenizers put a space before the first word of a text.
    answer = both[len(prompt) :] if both[: len(prompt)] == prompt else encode(answer_text, tokenizer)
    if tokenizer.chat_template is None:
        prompt = begun(prompt, begin(tokenizer))
    # One token of the prompt must stay: no logit predicts the first token of a sequence.
    truncated = len(prompt) + len(answer) > max_length
    answer = answer[: max_length - 1]
    room = max_length - len(answer)
    if len(prompt) > room:
        kept = prompt[: _kept(example.messages, prompt, room, tokenizer)]
        prompt = kept + prompt[len(prompt) - room + len(kept) :]
    return Tokens(ids=(*prompt, *answer), answer=len(prompt), truncated=truncated, rewritten=rewritten)


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation that the model is to go on with, in the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        text = "".join(f"{message.content}\n" for message in messages)
        return begun(encode(text, tokenizer), begin(tokenizer))
    (text,) = render_template(tokenizer, [(_turns(messages), True)])
    return encode(text, tokenizer)


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


def _texts(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, bool]:
    """The prompt, the answer with what ends the assistant's turn, and whether the template would change the answer."""
    content = messages[-1].content
    if tokenizer.chat_template is None:
        prompt = "".join(f"{message.content}\n" for message in messages[:-1])
        return prompt, content + _end(tokenizer), False
    turns = _turns(messages)
    marked_turns = [*turns[:-1], turns[-1] | {"content": _MARK}]
    prompt, whole, marked = render_template(tokenizer, [(turns[:-1], True), (turns, False), (marked_turns, False)])
    before, mark, after = marked.rpartition(_MARK)
    if not mark:
        raise template_error(tokenizer, "leaves out the answer, or writes another one")
    if not whole.startswith(prompt):
        # The template puts more in the generation prompt (`<think>`) than it leaves in a finished turn. Then
        # the prompt is what both share, but nothing of the answer, which may begin like what was left out.
        shared = takewhile(lambda signs: len(set(signs)) == 1, zip(prompt, before, whole, strict=False))
        prompt = "".join(signs[0] for signs in shared)
    written = whole[len(prompt) :].strip()
    if not prompt or not written:
        raise template_error(tokenizer, f"writes nothing {'before the answer' if written else 'of the answer'}")
    rewritten = not whole.endswith(content + after)
    # Reasoning that the template takes out is what may have to be learned: the answer is the data's, not its.
    answer = content if rewritten else whole[len(prompt) : len(whole) - len(after)]
    # Whitespace after the end of the turn belongs to the next turn: nobody generates it. A template that
    # writes nothing there would teach the model never to stop.
    return prompt, answer + (after.rstrip() or _end(tokenizer)), rewritten


def _turns(messages: Sequence[Message]) -> list[Turn]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _kept(messages: Sequence[Message], prompt: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a prompt's first tokens stay where it has `room`: what comes before the first message that is not the
    system's, with a token at least after it; or BOS alone.
    """
    turns = _turns(messages[:-1])
    first = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if tokenizer.chat_template is None:
        head = "".join(f"{turn['content']}\n" for turn in turns[:first])
    else:
        turns[first : first + 1] = [{"role": "user", "content": _MARK}]
        (marked,) = render_template(tokenizer, [(turns, True)])
        head = marked.partition(_MARK)[0]
    begins = begin(tokenizer)
    if not begins or prompt[: len(begins)] != begins:
        begins = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    # Tokens may span the border to the message.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(begun(encode(head, tokenizer), begins), prompt, strict=False))
    whole = sum(1 for _ in same)
    return whole if whole < room else min(len(begins), room)


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise LegolmError(
            "model: its tokenizer has no eos_token to end answers with; name one in tokenizer_config.json"
        )
    return str(tokenizer.eos_token)
