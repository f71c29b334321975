"""Conversations, and what one client holds of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `more` is what else it has (tool calls, a name), a JSON object, for the template."""

    role: Role
    content: str
    more: str = ""

    @property
    def turn(self) -> dict[str, Any]:
        """As files and chat templates have it."""
        return {"role": self.role, "content": self.content} | (json.loads(self.more) if self.more else {})


@dataclass(frozen=True)
class Example:
    """A conversation whose last message, the assistant's, is the answer to learn.

    `raw`: prompt and completion, or text alone, as they stand: nothing is written around or between them. `tools`: what
    the assistant may call, a JSON list, for the template.
    """

    messages: tuple[Message, ...]
    raw: bool = False
    tools: str = ""

    def __repr__(self) -> str:
        """Fingerprints of data stand on it: where there are no tools, nothing says so."""
        tools = f", tools={self.tools!r}" if self.tools else ""
        return f"Example(messages={self.messages!r}, raw={self.raw!r}{tools})"

    @property
    def is_text(self) -> bool:
        """Whether it is text alone."""
        return self.raw and len(self.messages) == 1

    @property
    def question(self) -> str:
        """The message before the answer; empty where the answer is all there is."""
        return self.messages[-2].content if len(self.messages) > 1 else ""

    @property
    def wanted(self) -> str:
        """The answer; the calls, where it calls tools and says nothing."""
        last = self.messages[-1]
        return last.content or last.more

    @property
    def turns(self) -> tuple[Example, ...]:
        """Each answer of the conversation that something stands before, as an example of its own."""
        ends = [place for place, one in enumerate(self.messages, 1) if one.role == "assistant" and place > 1]
        return tuple(Example(self.messages[:end], self.raw, self.tools) for end in ends) or (self,)
