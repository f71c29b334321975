"""Conversations to tokens, prompt and answer apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from legolm.data.examples import Example, Message
from legolm.data.sequence import begin, begun, border_token, encode, encode_all
from legolm.data.template import Turn, render_template, template_error
from legolm.errors import LegolmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "(the answer)"
"""In an answer's place it shows what the template writes before and after, whatever the answer begins or ends with."""

OTHER_TEMPLATE = "name a template that writes them in data.template, or leave these conversations out"
_BESIDE = ("role", "content", "name", "tool_call_id")
"""Fields of a turn that are no text of their own."""


@dataclass(frozen=True)
class Tokens:
    """A conversation. The answer is `ids[answer:]`, its end-of-turn token included; `answer` is 1 or more.

    `truncated`: it was longer. `rewritten`: the chat template would change the answer, which is here as it stands.
    `left_out`: it leaves out, or changes, a message before the answer, a tool's call, or another text of a turn.
    `unopened`: it asks with more than this prompt, the begin of an answer (`<think>`), which this answer is without.
    """

    ids: tuple[int, ...]
    answer: int
    truncated: bool = False
    rewritten: bool = False
    left_out: bool = False
    unopened: bool = False


class _Written(NamedTuple):
    """The prompt, the answer with what ends the assistant's turn, and what the template does to them (`Tokens`)."""

    prompt: str
    answer: str
    rewritten: bool
    left_out: bool
    unopened: bool = False


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """At most `max_length` tokens (2 or more) of the conversation in the tokenizer's chat template.

    It begins as the tokenizer begins a text (`begin`); a chat template writes its own begin. A prompt that is too long
    keeps this and the system message, and loses what follows them; the answer loses its end only if it is too long by
    itself. Raises `LegolmError` for a token that the model has no embedding for.
    """
    return render_many((example,), tokenizer, max_length)[0]


def render_many(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """As `render`, of some at once, which is several times faster."""
    batch = _encoded(examples, lambda: _texts(examples, tokenizer), tokenizer)
    return _tokens(batch, tokenizer, max_length)


def render_each(
    batches: Iterable[Sequence[Example]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Tokens]:
    """As `render_many`, of one batch after the other: while one is put together, the next is with the tokenizer and the
    one after that with the template.
    """
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as encoder:
        waiting = deque[Future[_Batch]]()
        for some in batches:
            texts = writer.submit(_texts, some, tokenizer)
            waiting.append(encoder.submit(_encoded, some, texts.result, tokenizer))
            if len(waiting) > 4:  # the parts take longer at times
                yield from _tokens(waiting.popleft().result(), tokenizer, max_length)
        for one in waiting:
            yield from _tokens(one.result(), tokenizer, max_length)


class _Batch(NamedTuple):
    """Examples, what is written of each, and the tokens: those that a text begins with, a prompt's, the whole's."""

    first: list[int]
    examples: Sequence[Example]
    texts: Sequence[_Written]
    prompts: list[list[int]]
    wholes: list[list[int]]


def _encoded(
    examples: Sequence[Example], texts: Callable[[], Sequence[_Written]], tokenizer: PreTrainedTokenizerBase
) -> _Batch:
    written = texts()
    # Nothing is tokenized twice where a token of the prompt's end (`<|im_start|>`) parts the text.
    border = border_token(written[0].prompt, tokenizer) if written else None
    cuts = [max(0, one.prompt.rfind(border)) if border else 0 for one in written]
    heads = [one.prompt[:cut] for one, cut in zip(written, cuts, strict=True)]
    tails = [one.prompt[cut:] for one, cut in zip(written, cuts, strict=True)]
    rests = [tail + one.answer for one, tail in zip(written, tails, strict=True)]
    texts_once = list(dict.fromkeys((*heads, *tails, *rests)))
    ids = dict(zip(texts_once, encode_all(texts_once, tokenizer), strict=True))
    prompts = [ids[head] + ids[tail] for head, tail in zip(heads, tails, strict=True)]
    wholes = [ids[head] + ids[rest] for head, rest in zip(heads, rests, strict=True)]
    return _Batch(begin(tokenizer), examples, written, prompts, wholes)


def _tokens(batch: _Batch, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    found: list[Tokens] = []
    long: list[int] = []
    for example, written, prompt, both in zip(batch.examples, batch.texts, batch.prompts, batch.wholes, strict=True):
        # Generation starts from the prompt's own tokens, so the loss must be on what follows exactly those. If a
        # token of the whole text spans the border, the answer is tokenized by itself; else the whole text serves,
        # since some tokenizers put a space before the first word of a text.
        answer = both[len(prompt) :] if both[: len(prompt)] == prompt else encode(written.answer, tokenizer)
        if example.raw or tokenizer.chat_template is None:
            # No logit predicts the first token of a sequence: where nothing is before a text, its own first stays.
            prompt = begun(prompt, batch.first) or [answer.pop(0)]
        truncated = len(prompt) + len(answer) > max_length
        answer = answer[: max_length - 1]
        if len(prompt) + len(answer) > max_length:
            long.append(len(found))
        found.append(Tokens((*prompt, *answer), len(prompt), truncated, *written[2:]))
    heads = _heads([batch.examples[place] for place in long], tokenizer)
    for place, head in zip(long, heads, strict=True):
        whole = found[place]
        asked, rest = list(whole.ids[: whole.answer]), whole.ids[whole.answer :]
        room = max_length - len(rest)
        kept = asked[: _kept(head, asked, room, batch.first, tokenizer)]
        asked = [*kept, *asked[len(asked) - room + len(kept) :]]
        found[place] = replace(whole, ids=(*asked, *rest), answer=len(asked))
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
    if not example.raw and any("tool_calls" in message.turn for message in example.messages):
        raise LegolmError("data: tool calls need a chat template, and the model has none; give one in data.template")
    end = "" if example.raw else "\n"
    prompt, answer = "".join(f"{message.content}{end}" for message in before), last.content + _end(tokenizer)
    return _Written(prompt, answer, False, _leaves_out(example, prompt + answer))


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
    return [_parted(*some, chat, tokenizer) for some, chat in zip(three, chats, strict=True)]


def _parted(prompt: str, whole: str, marked: str, chat: Example, tokenizer: PreTrainedTokenizerBase) -> _Written:
    """Of what the template makes of the turns before the answer, of all, and of all with a mark as the answer."""
    content, asked = chat.messages[-1].content, prompt
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
    if not content.strip() and any(name not in written for name in _calls(chat.messages[-1])):
        raise template_error(tokenizer, "leaves out the calls of tools that are an answer", OTHER_TEMPLATE)
    rewritten = not whole.endswith(content + after)
    # Reasoning that the template takes out is what may have to be learned: the answer is the data's, not its.
    answer = content if rewritten else whole[len(prompt) : len(whole) - len(after)]
    # Whitespace after the end of the turn belongs to the next turn: nobody generates it. A template that
    # writes nothing there would teach the model never to stop.
    unopened = not (prompt + answer).startswith(asked)
    return _Written(prompt, answer + (after.rstrip() or _end(tokenizer)), rewritten, _leaves_out(chat, whole), unopened)


def _leaves_out(chat: Example, whole: str) -> bool:
    """Whether what was written lacks a system's or user's message, a tool's call, or another text of their turns or the
    answer's. Earlier answers may lose their reasoning, as the model will; what tools said may be written as JSON.
    """
    last = chat.messages[-1]
    for message in chat.messages:
        said = [message.content] if message.role in ("system", "user") else []
        if message.more:
            said += _calls(message)
            if message.role in ("system", "user") or message is last:
                said += [text for name, text in message.turn.items() if name not in _BESIDE and isinstance(text, str)]
        if any(text.strip() not in whole for text in said):
            return True
    return False


def _calls(message: Message) -> list[str]:
    """Names of the functions that the turn calls, where it has them as chat templates take them."""
    calls = message.turn.get("tool_calls") if message.more else None
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _heads(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of each, what the prompt writes before the first message that is not the system's."""
    heads, chats = [""] * len(examples), list[tuple[int, tuple[list[Turn], bool, str]]]()
    for place, example in enumerate(examples):
        turns = [message.turn for message in example.messages[:-1]]
        first = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        if not example.raw and tokenizer.chat_template is None:
            heads[place] = "".join(f"{turn['content']}\n" for turn in turns[:first])
        elif not example.raw:
            turns[first : first + 1] = [{"role": "user", "content": _MARK}]
            chats.append((place, (turns, True, example.tools)))
    written = render_template(tokenizer, [chat for _, chat in chats]) if chats else []
    for (place, _), text in zip(chats, written, strict=True):
        heads[place] = text.partition(_MARK)[0]
    return encode_all(heads, tokenizer)


def _kept(
    head: Sequence[int], prompt: list[int], room: int, first: list[int], tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many of a prompt's first tokens stay where it has `room`: those of its head, with a token at least after it;
    or BOS alone.
    """
    if not first or prompt[: len(first)] != first:
        first = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    # Tokens may span the border to the message.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(begun(head, first), prompt, strict=False))
    whole = sum(1 for _ in same)
    return whole if whole < room else min(len(first), room)


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise LegolmError(
            "model: its tokenizer has no eos_token to end answers with; name one in tokenizer_config.json"
        )
    return str(tokenizer.eos_token)
