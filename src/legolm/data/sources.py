"""Rows from JSON, JSONL, CSV and Parquet files or a hub data set, and the conversation in each row.

Each row knows its place, so that every error says which line of which file to mend.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legolm.config import Fields
from legolm.data.examples import Example, Message
from legolm.errors import LegolmError, brief
from legolm.system import hub_answers, strict_json, wants_offline

MAX_BYTES = 4 * 10**9
MAX_TEXT = 1_000_000
"""Characters of one question or answer: far past every context window, and read in a second."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One record: its values, its file or hub data set (stem and all), and its place as errors cite it."""

    values: dict[str, Any]
    stem: str
    source: str
    place: str

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise LegolmError(f"{self.place}: no field `{name}`; there are: {brief(', '.join(self.values))}")
        return self.values[name]


def read_rows(source: str | Sequence[str], field: str) -> Iterator[Row]:
    """Rows of a path, a glob, `hub:owner/name[:split]` or a list of them; `field` names it in errors.

    Raises `LegolmError` for what cannot be read, and for what is named twice.
    """
    for part in parts_of(source, field):
        if isinstance(part, Path):
            yield from _read_file(part, field)
        else:
            yield from _read_hub(part, field)


def parts_of(source: str | Sequence[str], field: str) -> list[Path | str]:
    """The files and hub data sets of a source. Raises `LegolmError` for one that is there twice."""
    found: dict[str, Path | str] = {}
    for item in [source] if isinstance(source, str) else source:
        for part in [item] if item.startswith("hub:") else paths_of(item, field):
            if _same(part) in found:
                raise LegolmError(
                    f"{field}: {part} is named twice, so that its rows could be in two splits; name it once"
                )
            found[_same(part)] = part
    return list(found.values())


def check_apart(train: str | Sequence[str], other: str | Sequence[str], field: str) -> None:
    """Raise `LegolmError` where training data and that of another field share a file or hub data set."""
    trained = {_whole(part) for part in parts_of(train, "data.train")}
    for part in parts_of(other, field):
        if _whole(part) in trained:
            share = ", or a share such as 0.1 to hold out" if field.startswith("data.") else ""
            raise LegolmError(
                f"{field}: {part} is also in data.train, so that what was learned would be tested; take other rows"
                f"{share}"
            )


def _same(part: Path | str) -> str:
    """What all names of one file have in common, and all of one split of a hub data set."""
    if isinstance(part, Path):
        try:
            found = part.stat()
            return f"{found.st_dev} {found.st_ino}"  # hard links are one file, too
        except (OSError, ValueError):  # none there, a NUL in it; who opens it says so
            return str(part)
    return part if part.removeprefix("hub:").count(":") else f"{part}:train"


def _whole(part: Path | str) -> str:
    """As `_same`, and a slice of a hub's split, like `train[:10%]`, is that split."""
    return _same(part) if isinstance(part, Path) else _same(part).partition("[")[0]


def read_text(path: Path, field: str) -> str:
    """The whole UTF-8 file. Raises `LegolmError` if it is missing, too large or in another encoding."""
    check_file(path, field)
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise LegolmError(f"{path}:{line}: not UTF-8; save the file in UTF-8") from None


def to_example(row: Row, fields: Fields) -> Example:
    """The row's conversation. Raises `LegolmError` with the row's place if there is none with an answer."""
    if fields.messages is None:
        question = _text(row[fields.instruction], fields.instruction, row)
        answer = _text(row[fields.answer], fields.answer, row)
        return Example((Message("user", question), Message("assistant", answer)))
    turns = row[fields.messages]
    if not isinstance(turns, list) or len(turns) < 2:
        raise LegolmError(f"{row.place}: `{fields.messages}` must be a list of two messages or more")
    messages = tuple(_message(turn, f"{fields.messages}[{index}]", row) for index, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        raise LegolmError(f"{row.place}: `{fields.messages}` must end with role 'assistant'")
    return Example(messages)


def with_system(example: Example, system: str | None) -> Example:
    """The conversation with `system` before it, unless it has a system message or `system` is None."""
    if system is None or any(message.role == "system" for message in example.messages):
        return example
    return Example((Message("system", system), *example.messages))


def _message(turn: Any, field: str, row: Row) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise LegolmError(f"{row.place}: `{field}` must be an object with `role` and `content`")
    if turn["role"] not in ROLES:
        raise LegolmError(f"{row.place}: `{field}` has role {brief(repr(turn['role']))}; known: {', '.join(ROLES)}")
    return Message(turn["role"], _text(turn["content"], f"{field}.content", row))


def _text(value: Any, field: str, row: Row) -> str:
    if not isinstance(value, str):
        raise LegolmError(f"{row.place}: `{field}` must be text, not {type(value).__name__}")
    if not value.strip():
        raise LegolmError(f"{row.place}: `{field}` is empty; fill it or take the row out")
    if len(value) > MAX_TEXT:
        raise LegolmError(f"{row.place}: `{field}` has {len(value)} characters; at most {MAX_TEXT}, cut it into rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LegolmError(f"{row.place}: `{field}` has half a character at {error.start} ({error.reason})") from None
    return value


def paths_of(pattern: str, field: str) -> list[Path]:
    """The file of this name, or all that match the pattern. Raises `LegolmError` when none does."""
    try:
        path = Path(pattern).expanduser()
        if path.exists() or not any(sign in pattern for sign in "*?["):
            return [path]
        root = Path(path.anchor)
        found = sorted(match for match in root.glob(str(path.relative_to(root))) if match.is_file())
    except (ValueError, RuntimeError, OSError) as error:  # a pattern like a**b, the home of nobody, a name too long
        raise LegolmError(f"{field}: {pattern!r} is no path or pattern ({_first_line(error)})") from None
    if not found:
        raise LegolmError(f"{field}: {pattern!r} matches no file")
    return found


def check_file(path: Path, field: str) -> None:
    """Raise `LegolmError` unless this is a file of bearable size."""
    if path.is_dir():
        raise LegolmError(f"{field}: {path} is a folder; name its files, for instance {path}/*.jsonl")
    if not path.is_file():
        raise LegolmError(f"{field}: no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise LegolmError(f"{field}: {path} has more than {MAX_BYTES / 1e9:g} GB; cut it into several files")


def _read_file(path: Path, field: str) -> Iterator[Row]:
    check_file(path, field)
    if path.suffix not in _READERS:
        raise LegolmError(f"{field}: {path} is of no known kind; known: {', '.join(_READERS)}")
    empty = True
    for place, values in _READERS[path.suffix](path, field):
        empty = False
        if not isinstance(values, dict):
            raise LegolmError(f"{place}: a row must be an object, not {type(values).__name__}")
        yield Row(values, path.stem, str(path), place)
    if empty:
        raise LegolmError(f"{field}: {path} is empty")


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also cuts at U+2028, which JSON allows inside a string.
    for number, line in enumerate(read_text(path, field).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, path, number)


def _read_json(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    text = read_text(path, field)
    rows = _parse(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise LegolmError(f"{field}: {path} must be a list of objects; is it JSON lines? Then name it .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return strict_json(text)
    except json.JSONDecodeError as error:
        raise LegolmError(f"{path}:{first_line + error.lineno - 1}: not valid JSON ({error.msg})") from None
    except ValueError as error:  # a key twice, a number of thousands of digits, lists in lists without end
        raise LegolmError(f"{path}:{first_line}: cannot be read ({_first_line(error)})") from None


def _read_csv(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(read_text(path, field), newline=""), strict=True)
    header: list[str] = []
    start = 1  # of the record: one with line breaks in its cells has many lines
    try:
        for cells in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not header or not cells:
                header = header or _each_once(cells, place)
            elif len(cells) != len(header):
                raise LegolmError(
                    f"{place}: {len(cells)} cells but {len(header)} in the header; quote cells with commas"
                )
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise LegolmError(f"{path}:{start}: not valid CSV ({error})") from None


def _each_once(columns: list[str], place: str) -> list[str]:
    """The columns. Raises `LegolmError` for a name that two have; those without one are nobody's."""
    for name in columns:
        if name and columns.count(name) > 1:
            raise LegolmError(f"{place}: column {brief(name)} is there twice; rename one or take it out")
    return columns


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise LegolmError(f"{field}: {path} needs pyarrow; run: pip install 'legolm[data]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, ArithmeticError) as error:  # a date of the year 10000
        raise LegolmError(f"{field}: {path} is not valid Parquet ({_first_line(error)})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _read_hub(source: str, field: str) -> Iterator[Row]:
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise LegolmError(f"{field}: {source!r} needs datasets; run: pip install 'legolm[data]'") from None
    if not wants_offline() and not hub_answers():
        raise LegolmError(
            f"{field}: {source!r} cannot be loaded, the hub does not answer; set HF_HUB_OFFLINE=1 to use what was "
            "downloaded before, or give a file"
        )
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's client raises a dozen kinds: not downloaded before, not found, gated
        raise LegolmError(f"{field}: {source!r} cannot be loaded ({_first_line(error)}); give a file") from None
    for number, row in enumerate(rows, 1):
        yield Row(dict(row), name.rpartition("/")[2], name, f"{source} row {number}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
DATA_SUFFIXES = tuple(_READERS)
"""Endings of files that hold rows; any other file is plain text."""
