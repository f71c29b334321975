"""Conversations to tokens, prompt and answer apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from legolm.data.examples import Example, Message
from legolm.data.sequence import begin, begun, encode, encode_all
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


class _Written(NamedTuple):
    """The prompt, the answer with what ends the assistant's turn, and whether the template would change the answer."""

    prompt: str
    answer: str
    rewritten: bool


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """At most `max_length` tokens (2 or more) of the conversation in the tokenizer's chat template.

    It begins as the tokenizer begins a text (`begin`); a chat template writes its own begin. A prompt that is too long
    keeps this and the system message, and loses what follows them; the answer loses its end only if it is too long by
    itself. Raises `LegolmError` for a token that the model has no embedding for.
    """
    return render_many((example,), tokenizer, max_length)[0]


def render_many(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """As `render`, of some at once, which is several times faster."""
    return _tokens(examples, _texts(examples, tokenizer), tokenizer, max_length)


def render_each(
    batches: Iterable[Sequence[Example]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Tokens]:
    """As `render_many`, of one batch after the other: the next is with the template while one is tokenized."""
    with ThreadPoolExecutor(1) as ahead:
        waiting = deque[tuple[Sequence[Example], Future[list[_Written]]]]()
        for some in batches:
            waiting.append((some, ahead.submit(_texts, some, tokenizer)))
            if len(waiting) > 1:
                examples, texts = waiting.popleft()
                yield from _tokens(examples, texts.result(), tokenizer, max_length)
        for examples, texts in waiting:
            yield from _tokens(examples, texts.result(), tokenizer, max_length)


def _tokens(
    examples: Sequence[Example], texts: Sequence[_Written], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Tokens]:
    prompts = encode_all([one.prompt for one in texts], tokenizer)
    wholes = encode_all([one.prompt + one.answer for one in texts], tokenizer)
    first, found = begin(tokenizer), []
    for example, written, prompt, both in zip(examples, texts, prompts, wholes, strict=True):
        # Generation starts from the prompt's own tokens, so the loss must be on what follows exactly those. If a
        # token of the whole text spans the border, the answer is tokenized by itself; else the whole text serves,
        # since some tokenizers put a space before the first word of a text.
        answer = both[len(prompt) :] if both[: len(prompt)] == prompt else encode(written.answer, tokenizer)
        if example.raw or tokenizer.chat_template is None:
            # No logit predicts the first token of a sequence: where nothing is before a text, its own first stays.
            prompt = begun(prompt, first) or [answer.pop(0)]
        truncated = len(prompt) + len(answer) > max_length
        answer = answer[: max_length - 1]
        room = max_length - len(answer)
        if len(prompt) > room:
            kept = prompt[: _kept(example, prompt, room, tokenizer)]
            prompt = kept + prompt[len(prompt) - room + len(kept) :]
        found.append(Tokens((*prompt, *answer), len(prompt), truncated, written.rewritten))
    return found


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation that the model is to go on with, in the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        text = "".join(f"{message.content}\n" for message in messages)
        return begun(encode(text, tokenizer), begin(tokenizer))
    (text,) = render_template(tokenizer, [([message.turn for message in messages], True, "")])
    return encode(text, tokenizer)


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


def _texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[_Written]:
    chats = [] if tokenizer.chat_template is None else [one for one in examples if not one.raw]
    written = iter(_templated(chats, tokenizer))
    return [_plain(one, tokenizer) if one.raw or not chats else next(written) for one in examples]


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> _Written:
    """Without a template: as it stands, or a message a line."""
    *before, last = example.messages
    if not example.raw and any(message.more for message in example.messages):
        raise LegolmError("data: tool calls need a chat template, and the model has none; give one in data.template")
    end = "" if example.raw else "\n"
    return _Written("".join(f"{message.content}{end}" for message in before), last.content + _end(tokenizer), False)


def _templated(chats: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[_Written]:
    if not chats:
        return []
    wanted: list[tuple[Sequence[Turn], bool, str]] = []
    for chat in chats:
        turns = [message.turn for message in chat.messages]
        marked: list[Turn] = [*turns[:-1], {"role": "assistant", "content": _MARK}]
        wanted += [(turns[:-1], True, chat.tools), (turns, False, chat.tools), (marked, False, chat.tools)]
    try:
        texts = render_template(tokenizer, wanted)
    except LegolmError:
        if len(chats) == 1:
            raise
        # Each may take the time and memory of one: whose fault it is shows alone.
        return [_templated([chat], tokenizer)[0] for chat in chats]
    three = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    return [_parted(*some, chat.messages[-1].content, tokenizer) for some, chat in zip(three, chats, strict=True)]


def _parted(prompt: str, whole: str, marked: str, content: str, tokenizer: PreTrainedTokenizerBase) -> _Written:
    """Of what the template makes of the turns before the answer, of all, and of all with a mark as the answer."""
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
    return _Written(prompt, answer + (after.rstrip() or _end(tokenizer)), rewritten)


def _kept(example: Example, prompt: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a prompt's first tokens stay where it has `room`: what comes before the first message that is not the
    system's, with a token at least after it; or BOS alone.
    """
    turns = [message.turn for message in example.messages[:-1]]
    first = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if example.raw:
        head = ""
    elif tokenizer.chat_template is None:
        head = "".join(f"{turn['content']}\n" for turn in turns[:first])
    else:
        turns[first : first + 1] = [{"role": "user", "content": _MARK}]
        (marked,) = render_template(tokenizer, [(turns, True, example.tools)])
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
