"""What scripts give is of the kinds that the signatures say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from legolm.errors import LegolmError, brief

P = ParamSpec("P")
R = TypeVar("R")


def door(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises `LegolmError` for the first argument that is not of its annotation's kind."""
    signature, kinds = inspect.signature(function), get_type_hints(function)
    where = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checked(*given: P.args, **named: P.kwargs) -> R:
        for name, value in signature.bind(*given, **named).arguments.items():
            if name in kinds and not _fits(value, kinds[name]):
                # Nobody who gives one text takes it for a sequence of texts.
                kind = str(function.__annotations__[name]).replace("Sequence", "list")
                if get_origin(kinds[name]) is Literal:
                    kind = " or ".join(map(repr, get_args(kinds[name])))
                raise LegolmError(f"{where}: `{name}` = {brief(repr(value))}: must be {kind}")
        return function(*given, **named)

    return checked


def _fits(value: Any, kind: Any) -> bool:
    of, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if of is Literal:
        return value in parts
    if of in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if of is Sequence:
        return is_list(value) and all(_fits(one, parts[0]) for one in value)
    if of in (Mapping, dict):
        return isinstance(value, of) and all(_fits(key, parts[0]) and _fits(value[key], parts[1]) for key in value)
    return isinstance(value, int | float if kind is float else kind)


def is_list(value: object) -> bool:
    """Whether it is several things in order, which can be gone through again: no text, no generator."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
