"""Conversations, and what one client holds of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation whose last message, the assistant's, is the answer to learn."""

    messages: tuple[Message, ...]

    @property
    def question(self) -> str:
        """The message before the answer; empty where the answer is all there is."""
        return self.messages[-2].content if len(self.messages) > 1 else ""

    @property
    def wanted(self) -> str:
        """The answer."""
        return self.messages[-1].content


@dataclass(frozen=True)
class ClientData:
    """What one client holds. It never leaves the client."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
