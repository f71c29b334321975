"""The conversation in each row: known layouts, by the names of their fields or as a config names them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from legolm.config import LAYOUT_FIELDS, Fields, RowsConfig
from legolm.data.examples import Example, Message, Role
from legolm.data.files import BadRow, Written, kind_of
from legolm.data.sources import Row, read_records
from legolm.errors import LegolmError, brief
from legolm.system import strict_json

MAX_TEXT = 1_000_000
"""Characters of one question or answer: far past every context window, and read in a second."""
NAME_THEM = "name them (`fields` of a config, --instruction and its like of a command)"
BLANK = "."
"""In the place of an answer that is to be written: what stands before it is the prompt."""
NAMED, ALIKE = 10, 5
"""Bad rows that are named, and those of them with one and the same fault; the others are counted."""
COLUMNS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "messages": {"messages": ("messages", "conversations", "conversation")},
    "sharegpt": {"messages": ("conversations", "conversation", "messages")},
    "alpaca": {"instruction": ("instruction",), "input": ("input",), "answer": ("output",)},
    "dolly": {"instruction": ("instruction",), "input": ("context",), "answer": ("response",)},
    "pairs": {"instruction": ("prompt",), "answer": ("completion",)},
    "text": {"text": ("text",)},
}
"""Names of a layout's fields in a row, where none are given."""
MAY_LACK, TOOLS = "input", "tools"
SHAREGPT_ROLES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""Beside the roles' own names."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Found:
    """A row's layout, and the names that its fields have in this row; an optional field may be missing."""

    layout: str
    columns: Mapping[str, str]


def layout_of(row: Row, config: RowsConfig) -> Found:
    """The config's layout, or that which the row's fields are of; the nearest, where one is missing.

    Raises `BadRow` where there is nothing of any.
    """
    used = _used(config.layout, config.fields)
    there = tuple(name for name in row.values if name in used)
    filled = tuple(name for name in there if row.values[name] is not None)
    found, whole = _of_fields(there, filled, config.layout, config.fields)
    if whole:
        return _by_turns(found, row, config)
    if config.layout == "auto" and not config.fields.given:
        known = brief(", ".join(map(str, row.values)))
        if not row.values.keys() & set(found.columns.values()):
            raise BadRow(row.place, f"fields {known} are of no known layout", NAME_THEM)
        lacks = next(name for role, name in found.columns.items() if role != MAY_LACK and name not in row.values)
        raise BadRow(row.place, f"no field `{lacks}`; there are: {known}", NAME_THEM)
    return found


@lru_cache(maxsize=256)  # asked for every row, and most rows have the same fields
def _of_fields(names: tuple[str, ...], filled: tuple[str, ...], layout: str, fields: Fields) -> tuple[Found, bool]:
    """The layout of rows with these fields, and whether all that it needs is there, or it is the nearest.

    `names` are those that layouts know. Rows of several may have all fields, and of the others' none is `filled`.
    """
    tries = [Found(name, _columns(roles, names)) for name, roles in _candidates(layout, fields)]
    there = set(names)
    for known in (set(filled), there):
        whole = [one for one in tries if all(name in known for role, name in one.columns.items() if role != MAY_LACK)]
        alike = [one for one in whole if one.columns.keys() == whole[0].columns.keys()]
        if alike:
            return max(alike, key=lambda one: len(known & set(one.columns.values()))), True
    return max(tries, key=lambda one: len(there & set(one.columns.values()))), False


def to_example(row: Row, config: RowsConfig) -> Example:
    """The row's conversation. Raises `BadRow` if there is none with an answer."""
    return _example(row, layout_of(row, config))


def with_system(example: Example, system: str | None) -> Example:
    """The conversation with `system` before it, unless it has a system message, is no chat, or `system` is None."""
    if system is None or example.raw or any(message.role == "system" for message in example.messages):
        return example
    return replace(example, messages=(Message("system", system), *example.messages))


class Reading:
    """What is made of the rows of a source, and what there is to say of them once all are read."""

    def __init__(
        self, config: RowsConfig, field: str, label: str | None = None, system: bool = False, ask: bool = False
    ) -> None:
        """`label` is a field that each row must have; `system`: whether a system message is put before chats; `ask`:
        rows are questions, whose answer may be missing."""
        self._config, self._field, self._label, self._system, self._ask = config, field, label, system, ask
        self._layouts: Counter[str] = Counter()
        self._inputs: Counter[str] = Counter()
        self._tools: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self._bad: list[BadRow] = []
        self._alike: Counter[str] = Counter()
        self._skipped = self._rows = 0

    def examples(self, source: str | Sequence[str]) -> Iterator[tuple[Row, Example]]:
        """Rows with their conversations. Raises `LegolmError` at the end for the bad ones, if they are not skipped."""
        for row in read_records(source, self._field):
            self._rows += 1
            bad: BadRow | None = None
            try:
                if isinstance(row, BadRow):
                    raise row
                if self._label is not None and _is_empty(row[self._label]):
                    raise BadRow(row.place, f"`{self._label}` is empty, by which rows are split")
                read = _to_answer(row, self._config) if self._ask else row
                found = layout_of(read, self._config)
                example = _example(read, found)
                if self._ask and len(example.messages) == 1:
                    raise BadRow(row.place, f"`{found.columns['text']}` is a text, and asks nothing", NAME_THEM)
                self._count(read, found, example)
            except BadRow as error:
                bad = error
            except RecursionError:
                bad = BadRow(getattr(row, "place", self._field), "is nested too deep", "take that field out")
            if bad is not None:
                self._skipped += 1
                self._alike[bad.fault] += 1
                # Of a file whose header has other names each row is bad, and there may be others.
                if len(self._bad) < NAMED and self._alike[bad.fault] <= ALIKE:
                    self._bad.append(bad)
                continue
            assert isinstance(row, Row)  # else it was raised
            yield row, example
        if self._bad and (self._config.bad_rows == "refuse" or self._skipped == self._rows):
            raise self._error()

    @property
    def notes(self) -> list[str]:
        """The layouts that were taken, and rows that were skipped: a sentence each."""
        taken = "; ".join(
            f"{name}: {count:,} of {self._rows:,} rows"
            + (f", {self._inputs[name]:,} with {COLUMNS[name][MAY_LACK][0]}" if self._inputs[name] else "")
            + (f", {self._tools[name]:,} with {TOOLS}" if self._tools[name] else "")
            for name, count in self._layouts.items()
        )
        said = [f"{self._field}: {taken}."] if taken else []
        raw = self._layouts["pairs"] + self._layouts["text"]
        if raw and self._system:
            said.append(f"{self._field}: data.system is for chats only; {raw:,} rows are trained on as they stand.")
        named = self._config.fields.input
        if named is not None and taken and not self._inputs.total():
            said.append(f"{self._field}: no row has anything in field `{named}` (fields.input).")
        if self._skipped:
            said.append(f"{self._field}: {self._skipped:,} of {self._rows:,} rows skipped: {self._named()}.")
        return said

    def _count(self, row: Row, found: Found, example: Example) -> None:
        self._layouts[found.layout] += 1
        self._tools[found.layout] += bool(example.tools)
        self._inputs[found.layout] += bool(_context(row, found))
        self.unused.update(name for name in _unused(row, found, example) if name != self._label)

    def _named(self) -> str:
        more = self._skipped - len(self._bad)
        return "; ".join(bad.short for bad in self._bad) + (f"; and {more:,} more" if more else "")

    def _error(self) -> LegolmError:
        if self._skipped == 1:
            return self._bad[0]
        if self._skipped == self._rows:
            return LegolmError(f"{self._field}: none of {self._rows:,} rows can be used: {self._bad[0]}")
        return LegolmError(
            f"{self._field}: {self._skipped:,} of {self._rows:,} rows are bad: {self._named()}; mend them, or leave "
            "them out (bad_rows: skip)"
        )


def read_examples(
    source: str | Sequence[str], config: RowsConfig, field: str, notes: list[str] | None = None
) -> Iterator[Example]:
    """Conversations of all rows; what there is to say of them is added to `notes`.

    Raises `LegolmError` for what cannot be read, and at the end for bad rows that are not skipped.
    """
    reading = Reading(config, field)
    for _, example in reading.examples(source):
        yield example
    if notes is not None:
        notes += [*reading.notes, *unread(field, reading.unused)]


def _to_answer(row: Row, config: RowsConfig) -> Row:
    """The row with a blank where a question of its layouts has no answer."""
    values = dict(row.values)
    for _, roles in _candidates(config.layout, config.fields):
        if any(name in row.values for name in roles.get("instruction", ())):
            values |= {name: BLANK for name in roles["answer"] if _is_empty(row.values.get(name))}
        for name in roles.get("messages", ()):
            values |= {name: _to_end(values[name])} if name in values else {}
    return replace(row, values=values)


def _to_end(turns: Any) -> Any:
    """Turns with a blank answer behind a question; what is no such list stays."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict):
        return turns
    who, what = ("role", "content") if "role" in last else ("from", "value")
    asks = last.get(who) in {
        "user",
        "human",
        "tool",
        *(name for name, role in SHAREGPT_ROLES.items() if role == "tool"),
    }
    return [*turns, {who: "assistant", what: BLANK}] if asks else turns


def _unused(row: Row, found: Found, example: Example) -> list[str]:
    used = {*found.columns.values(), *((TOOLS,) if example.tools else ())}
    holds = _holds_text if found.layout != "text" else lambda value: not _is_empty(value)  # labels, beside a text
    names = [name for name, value in row.values.items() if name not in used and holds(value)]
    if "messages" in found.columns:
        field = found.columns["messages"]
        more = {key for turn in row[field] for key, value in turn.items() if isinstance(value, int | float)}
        names += [f"{field}[].{key}" for key in sorted(more - {"content", "value"})]
    return names


def unread(field: str, unused: Mapping[str, int]) -> list[str]:
    """A sentence for each field of rows that holds something which nothing uses."""
    return [f"{field}: nothing uses field `{name}` ({count:,} rows)." for name, count in unused.items()]


@lru_cache(maxsize=16)
def _used(layout: str, fields: Fields) -> frozenset[str]:
    """All names that the fields of these layouts may have."""
    return frozenset(name for _, roles in _candidates(layout, fields) for some in roles.values() for name in some)


def _candidates(layout: str, fields: Fields) -> list[tuple[str, Mapping[str, Sequence[str]]]]:
    """Layouts that rows may have, and the names that each of their fields may have: the one given, else all its own."""
    given = fields.given
    names = [name for name, has in LAYOUT_FIELDS.items() if given.keys() <= set(has)] if layout == "auto" else [layout]
    return [
        (name, {role: (given[role],) if given.get(role) else own for role, own in COLUMNS[name].items()})
        for name in names
    ]


def _columns(roles: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, str]:
    """The names of a layout's fields among a row's: those that are there, or the first."""
    return {role: next((name for name in some if name in names), some[0]) for role, some in roles.items()}


def _by_turns(found: Found, row: Row, config: RowsConfig) -> Found:
    """Where the turns say so, and the config does not, `messages` are of the other layout."""
    if config.layout != "auto" or "messages" not in found.columns:
        return found
    turns = row.values[found.columns["messages"]]
    first = turns[0] if isinstance(turns, list) and turns else None
    theirs = isinstance(first, dict) and "from" in first and "role" not in first
    return Found("sharegpt" if theirs else "messages", found.columns)


def _example(row: Row, found: Found) -> Example:
    names = found.columns
    if "messages" in names:
        return _chat(row, names["messages"], "from" if found.layout == "sharegpt" else "role")
    if "text" in names:
        return Example((Message("assistant", _text(row[names["text"]], names["text"], row)),), raw=True)
    question, answer = (_text(row[names[role]], names[role], row) for role in ("instruction", "answer"))
    context = _context(row, found)
    messages = Message("user", f"{question}\n\n{context}" if context else question), Message("assistant", answer)
    return Example(messages, raw=found.layout == "pairs")


def _context(row: Row, found: Found) -> str:
    """What stands beside the instruction; often nothing."""
    name = found.columns.get(MAY_LACK)
    value = row.values.get(name) if name else None
    return "" if _is_empty(value) else _text(value, str(name), row)


def _chat(row: Row, field: str, role: str) -> Example:
    turns = row[field]
    if not isinstance(turns, list) or len(turns) < 2:
        raise BadRow(row.place, f"`{field}` must be a list of two messages or more")
    read = _shared if role == "from" else _message
    messages = tuple(read(turn, f"{field}[{index}]", row) for index, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        raise BadRow(row.place, f"`{field}` must end with role 'assistant'")
    return Example(messages, tools=_tools(row.values.get(TOOLS)))


def _tools(value: Any) -> str:
    """A list of objects, or JSON of one, as JSON; empty for anything else. What is null there is what tables fill."""
    if isinstance(value, str):
        try:
            value = strict_json(value)
        except ValueError:
            return ""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return ""
    return json.dumps(_filled(value), ensure_ascii=False, default=str)


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(one) for name, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _message(turn: Any, field: str, row: Row) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys() | _calls(turn):
        raise BadRow(row.place, f"`{field}` must be an object with `role` and `content`")
    if turn["role"] not in ROLES:
        raise BadRow(row.place, f"`{field}` has role {brief(repr(turn['role']))}; known: {', '.join(ROLES)}")
    more = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
    if "tool_calls" in more:
        # Tables have a column for each argument of any call, and null where a call has none.
        in_table = row.source.startswith("hub:") or kind_of(Path(row.source)) == ".parquet"
        more["tool_calls"] = _as_objects(_filled(more["tool_calls"]) if in_table else more["tool_calls"])
    content = turn.get("content")
    if _is_empty(content) and (_calls(turn) or turn["role"] == "tool"):
        return Message(turn["role"], "", json.dumps({"content": content} | more, default=str))
    if isinstance(content, list):
        content = "".join(_text(_part(part, field, row), f"{field}.content", row) for part in content)
    return Message(turn["role"], _text(content, f"{field}.content", row), json.dumps(more, default=str) if more else "")


def _as_objects(calls: Any) -> Any:
    """Calls with their arguments as objects, where they are the JSON text of one: templates would quote it again."""
    if isinstance(calls, list):
        return [_as_objects(one) for one in calls]
    if not isinstance(calls, dict):
        return calls
    found = {name: _as_objects(value) if name == "function" else value for name, value in calls.items()}
    if isinstance(text := found.get("arguments"), str):
        with suppress(ValueError):
            found |= {"arguments": value} if isinstance(value := strict_json(text), dict) else {}
    return found


def _calls(turn: Mapping[str, Any]) -> set[str]:
    """{"content"} for a turn that calls tools, and so may say nothing."""
    return {"content"} if turn.get("tool_calls") else set()


def _part(part: Any, field: str, row: Row) -> Any:
    """The text of one part of a content in parts."""
    if not isinstance(part, dict) or "text" not in part or part.get("type", "text") != "text":
        raise BadRow(row.place, f"`{field}.content` has a part that is no text")
    return part["text"]


def _shared(turn: Any, field: str, row: Row) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise BadRow(row.place, f"`{field}` must be an object with `from` and `value`")
    name = turn["from"].lower() if isinstance(turn["from"], str) else turn["from"]
    role = SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        known = ", ".join([*ROLES, *SHAREGPT_ROLES])
        raise BadRow(row.place, f"`{field}` is from {brief(repr(turn['from']))}; known: {known}")
    more = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return Message(role, _text(turn["value"], f"{field}.value", row), json.dumps(more, default=str) if more else "")


def _is_empty(value: Any) -> bool:
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # as tables write what is missing
    return missing or (isinstance(value, str | list) and not value) or (isinstance(value, str) and not value.strip())


def _holds_text(value: Any) -> bool:
    """Letters, alone or in lists and objects; numbers and what only counts rows are none."""
    if isinstance(value, str):
        return any(sign.isalpha() for sign in value)
    if isinstance(value, list | dict):
        return any(map(_holds_text, value.values() if isinstance(value, dict) else value))
    return False


def _text(value: Any, field: str, row: Row) -> str:
    if isinstance(value, bool | int | float) and not _is_empty(value):  # labels
        value = str(value) if isinstance(value, Written) else json.dumps(value)
    if value is None or isinstance(value, float):
        raise BadRow(row.place, f"`{field}` is null", "fill it or take the row out")
    if not isinstance(value, str):
        raise BadRow(row.place, f"`{field}` must be text, not {type(value).__name__}")
    if not value.strip():
        raise BadRow(row.place, f"`{field}` is empty", "fill it or take the row out")
    if len(value) > MAX_TEXT:
        raise BadRow(row.place, f"`{field}` has {len(value)} characters", f"at most {MAX_TEXT}, cut it into rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(row.place, f"`{field}` has half a character at {error.start} ({error.reason})") from None
    return value
