"""Config files: read YAML, apply `a.b=value` overrides, validate, write.

An unknown key fails with the nearest known one; every other error names the field, the value and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from legolm.config.aggregation import AggregateConfig
from legolm.config.blocks import BlockConfig
from legolm.config.run import RunConfig
from legolm.config.section import Name, OpenSection, Section
from legolm.config.sections import TrainConfig
from legolm.errors import LegolmError, nearest
from legolm.system import read_bounded

S = TypeVar("S", bound=Section)
OPEN: dict[str, type[OpenSection]] = {"aggregate": AggregateConfig, "train": TrainConfig}
UNION_BRANCH = re.compile(r"(function-|constrained-|list\[|dict\[|literal\[).*|str")
"""What pydantic adds to a field's place to say which of its types did not fit."""
MAX_SIZE = 4_000_000
"""Characters of a config with all its aliases written out: ten thousand clients fit."""
MAX_NODES = 75_000
"""Keys and values of a config: ten thousand clients with a profile each fit."""
TEXT_KEY, MERGE_KEY = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
MAX_SHOWN = 200
NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?$|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
"""YAML 1.2's: with 1.1's sixtieths and octals `2:4` were 124, and `010` 8."""


def load(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (list items by index), validate. Raises `LegolmError`."""
    raw = read(path)
    override_all(raw, overrides or [])
    return validate(RunConfig, raw, f"config {path}")


def read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises `LegolmError`."""
    try:
        text = read_bounded(path, 4 * MAX_SIZE).decode("utf-8")
    except FileNotFoundError:
        raise LegolmError(f"config {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise LegolmError(f"config {path}: cannot be read ({error})") from None
    try:
        raw = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise LegolmError(f"config {path}{where}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(raw, dict):
        raise LegolmError(f"config {path}: must be a mapping of sections, not {type(raw).__name__}")
    unshared: dict[str, Any] = _unshared(raw)
    return unshared


def validate(kind: type[S], raw: dict[str, Any], source: str) -> S:
    """Check a raw mapping; `source` names it in errors. Raises `LegolmError` with the first problem."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise LegolmError(f"{source}: {_explain(_clearest(error.errors()), kind)}") from None


def block_at(folder: Path, given: str, raw: Mapping[str, Any], recover: int, source: str) -> BlockConfig:
    """The block to cut into a folder, as which it is called, with so many steps of recovery.

    Raises `LegolmError`, which begins with `given` where it cannot be called so, and with `source` for what else is
    wrong.
    """
    try:
        name = TypeAdapter(Name).validate_python(folder.name)
    except ValidationError:
        raise LegolmError(
            f"{given}: a block is called as its folder; give that a name of up to 64 letters, digits, `.`, `_` "
            "and `-`, a letter or digit first, and not `llm`"
        ) from None
    return validate(BlockConfig, {"name": name, "recover": {"steps": recover}, **raw}, source)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML: loading it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def named_first(change: str) -> bool:
    """A key to sort changes by: those that name a scheme or trainer drop what its section held of another one, and
    nothing of the changes beside them."""
    section, _, field = change.partition("=")[0].partition(".")
    return not (section in OPEN and field in ("", OPEN[section].named))


def override_all(raw: dict[str, Any], changes: Sequence[str]) -> None:
    """Apply several `a.b=value` in place, in whatever order they stand. Raises `LegolmError`."""
    for one in sorted(changes, key=named_first):
        _override(raw, one)


def _override(raw: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise LegolmError(f"--set {change!r}: write it as a.b=value, for instance --set train.steps=4")
    source = f"--set {_shown(change)}"
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise LegolmError(f"{source}: the value is not valid YAML ({_one_line(error)})") from None
    assign(raw, path, value, source)


def assign(raw: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set the field `a.b` in place, list items by index. Raises `LegolmError`; `source` names the change in it."""
    keys = path.split(".")
    at: Any = raw
    for depth, key in enumerate(keys[:-1]):
        child = _item(at, key, source) if isinstance(at, list) else at.get(key)
        if not isinstance(child, dict | list):
            here = ".".join(keys[: depth + 1])
            if isinstance(at, list) or (child is not None and here != "data"):
                raise LegolmError(f"{source}: {here} is a value and has no fields")
            # `data: starter` is short for {train: starter}.
            child = at[key] = {} if child is None else {"train": child}
        at = child
    if isinstance(at, list):
        _item(at, keys[-1], source)
        at[int(keys[-1])] = value
        return
    open_section = OPEN.get(keys[0])
    if open_section is not None and keys[-1] == open_section.named:
        # What the section held of another scheme or trainer goes with it.
        held = at.get(keys[-1], open_section.model_fields[keys[-1]].default)
        for key in set(at) - set(open_section.model_fields) if held != value else ():
            del at[key]
    at[keys[-1]] = value


class _Loader(yaml.SafeLoader):
    """Reads no more nodes than a config may have, each costs 20 microseconds, and numbers as people write them."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            problem = f"it has more than {MAX_NODES} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    """The one YAML document in `text`. Raises `yaml.YAMLError`, also for a key given twice and for what never ends."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        # The 31st of February, a number of 5,000 digits, a list as key; a tag on what is none: !!bool foo, !!int ''.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    """The value with a copy for each alias: an override of one is none of the others."""
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else value


def _check(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Characters of a node with its aliases written out. Raises `yaml.YAMLError` for too many, or a key given twice."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="it contains itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag not in (TEXT_KEY, MERGE_KEY):  # a number, a date, `yes`: `{rate: 0.002,2}` has the key 2
                problem = f"the key {_shown(key.value)} is no word; mend it, or put it in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"{_shown(key.value)} is given twice; take one out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        size = sum(_check(key, sizes) + _check(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size = sum(_check(item, sizes) for item in node.value)
    else:
        size = len(node.value)
        try:
            node.value.encode()
        except UnicodeEncodeError:
            raise yaml.MarkedYAMLError(problem="half a character", problem_mark=node.start_mark) from None
    if size >= MAX_SIZE:
        raise yaml.MarkedYAMLError(
            problem=f"with its aliases written out it has more than {MAX_SIZE} characters", problem_mark=node.start_mark
        )
    sizes[id(node)] = size + 1
    return size + 1


def _shown(value: object) -> str:
    """A value as errors show it: its beginning, where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python reads a hexadecimal number of any length, and writes none of over 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _item(items: list[Any], key: str, source: str) -> Any:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(items):
        allowed = f"an index from 0 to {len(items) - 1}" if items else "the name of a field; the list here is empty"
        raise LegolmError(f"{source}: {_shown(key)} must be {allowed}")
    return items[int(key)]


def _place(problem: ErrorDetails) -> list[str | int]:
    return [part for part in problem["loc"] if isinstance(part, int) or not UNION_BRANCH.fullmatch(part)]


def _clearest(problems: list[ErrorDetails]) -> ErrorDetails:
    """The first field's problem; where it may be of several types, that of the type which the value has."""
    same = [problem for problem in problems if _place(problem) == _place(problems[0])]
    return next((problem for problem in same if not problem["type"].endswith("_type")), same[0])


def _explain(problem: ErrorDetails, kind: type[BaseModel]) -> str:
    location = _place(problem)
    field = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        return f"unknown key `{field}`;{nearest(str(location[-1]), known)}"
    if problem["type"] == "missing":
        return f"`{field}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        if field and message.startswith("unknown key `"):  # a section's own, which names it without the section
            return message.replace("`", f"`{field}.", 1)
        return f"`{field}`: {message}" if field else message
    return f"`{field}` = {_shown(problem['input'])}: {message[0].lower()}{message[1:]}"


def _known_keys(section: Any, location: list[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
            section = found[0] if found else section
    return list(section.model_fields)
