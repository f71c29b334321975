"""legolm: small language models cut out of a large one, fine-tuned where data lives, put back together.

The public names (docs/api.md) are loaded when they are first used: importing the package takes no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from legolm.errors import LegolmError

if TYPE_CHECKING:
    from legolm.adapter import Change
    from legolm.aggregate import Scheme, Start, scheme
    from legolm.api import LLM, Client, Federation, Run, ablate, compare, compose, cut, evaluate, questions, read
    from legolm.block import Block, Coverage, read_block
    from legolm.data import Example, Message
    from legolm.export import load
    from legolm.finetune import Task, trainer
    from legolm.prune import criterion

_HOMES = {
    "legolm.adapter": ("Change",),
    "legolm.aggregate": ("Scheme", "Start", "scheme"),
    "legolm.api": (
        "LLM",
        "Client",
        "Federation",
        "Run",
        "ablate",
        "compare",
        "compose",
        "cut",
        "evaluate",
        "questions",
        "read",
    ),
    "legolm.block": ("Block", "Coverage", "read_block"),
    "legolm.data": ("Example", "Message"),
    "legolm.export": ("load",),
    "legolm.finetune": ("Task", "trainer"),
    "legolm.prune": ("criterion",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Block",
    "Change",
    "Client",
    "Coverage",
    "Example",
    "Federation",
    "LegolmError",
    "Message",
    "Run",
    "Scheme",
    "Start",
    "Task",
    "__version__",
    "ablate",
    "compare",
    "compose",
    "criterion",
    "cut",
    "evaluate",
    "load",
    "questions",
    "read",
    "read_block",
    "scheme",
    "trainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'legolm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
