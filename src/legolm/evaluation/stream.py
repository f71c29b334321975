"""A model's reply to a conversation, as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any

import torch

from legolm.data import Example, Message, render, render_prompt
from legolm.errors import LegolmError
from legolm.evaluation.greedy import ends_of
from legolm.models import continued


def answer_ends(tokenizer: Any, model: Any = None) -> list[int]:
    """Tokens that end an answer: the end of text, what the chat template writes after an answer, and what the model's
    own settings say."""
    rendered = render(Example((Message("user", "a"), Message("assistant", "b"))), tokenizer, 1 << 20)
    return ends_of([rendered], tokenizer, model)


def reply(model: Any, tokenizer: Any, messages: Sequence[Message], most: int, temperature: float) -> Iterator[str]:
    """Pieces of the answer, at most `most` tokens in all; the likeliest ones at temperature 0.

    Raises `LegolmError` for a conversation that leaves no room in the model's context.
    """
    from transformers import TextIteratorStreamer

    ids = render_prompt(messages, tokenizer)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise LegolmError(
            f"chat: the conversation has {len(ids)} tokens and the model takes {model.config.max_position_embeddings}; "
            "begin a new one"
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    failed: list[Exception] = []

    def work() -> None:
        try:
            continued(
                model,
                given,
                min(most, room),
                streamer=streamer,
                eos_token_id=answer_ends(tokenizer, model),
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
